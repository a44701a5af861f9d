from datetime import UTC, datetime, timedelta, timezone

from llama2_chat.agent import Clock


def test_the_clock_tells_the_day_and_the_time_with_their_zone():
    zone = timezone(timedelta(hours=1), "CET")
    assert Clock(lambda: datetime(2026, 11, 27, 9, 5, tzinfo=zone)).run("now") == "Friday, 27 November 2026, 09:05 CET"


def test_without_another_clock_it_is_that_of_this_machine():
    before, told = datetime.now(UTC).astimezone(), Clock().run("now")
    assert str(before.year) in told or str(before.year + 1) in told
    assert told.endswith(str(before.tzname()))
