"""Who gets in where AUTH_FILE says who may: over the page, over Gradio's own API, and over ours."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from gradio_client import Client

from llama2_chat.errors import ChatError
from llama2_chat.server import login
from model import ChatModel
from tests.support.scripted import ScriptedChat
from tests.support.serving import serving

ANNA = {"username": "anna", "password": "sésame: öffne dich"}


@pytest.fixture(scope="module")
def auth_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("login") / "users.txt"
    path.write_text(f"# who may\n\nanna:{login.hash_password(ANNA['password'])}\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def address(auth_file, settings):
    with serving(
        ChatModel(settings),
        replace(settings, auth_file=auth_file, trusted_proxies="127.0.0.1"),
        login.read_users(auth_file),
    ) as address:
        yield address


@pytest.fixture
def http(address):
    with httpx.Client(base_url=address) as http:
        yield http


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/config"),
        ("GET", "/gradio_api/info"),
        ("POST", "/gradio_api/queue/join"),
        ("GET", "/gradio_api/queue/data?session_hash=x"),
        ("POST", "/gradio_api/call/chat"),
        ("POST", "/gradio_api/run/chat"),
        ("GET", "/page/state"),
    ],
)
def test_without_a_login_nothing_of_the_page_can_be_used(http, method, path):
    assert http.request(method, path, json={} if method == "POST" else None).status_code == 401


def test_the_page_itself_shows_no_more_than_a_login(http):
    page = http.get("/").text
    assert '"auth_required":true' in page
    assert '"components":[]' in page


def test_with_a_login_all_is_there(http):
    assert http.post("/login", data=ANNA).status_code == 200
    assert "System prompt" in http.get("/config").text


@pytest.mark.parametrize(
    ("proto", "attributes"), [("http", {"HttpOnly", "SameSite=Lax"}), ("https", {"HttpOnly", "SameSite=Lax", "Secure"})]
)
def test_the_cookie_of_a_login_is_for_this_site_and_no_script(http, proto, attributes):
    answer = http.post("/login", data=ANNA, headers={"X-Forwarded-Proto": proto})
    (cookie,) = answer.headers.get_list("set-cookie")
    assert attributes == set(cookie.split("; ")[1:]) - {"Path=/"}
    assert ("unsecure" in cookie) == (proto == "http")


def test_nothing_that_an_answer_shows_can_log_its_reader_out(http):
    # ![x](/logout) in an answer did, on all devices.
    http.post("/login", data=ANNA)
    for path in ("/logout", "/page/log-out"):
        assert http.get(path).status_code in (404, 405)
    token = http.get("/page/state").json()["logOutToken"]
    assert http.post("/page/log-out", headers={"Origin": "https://evil.example", "X-Token": token}).status_code == 403
    for wrong in ({}, {"X-Token": ""}, {"X-Token": "0" * 64}, {"X-Token": b"\xe4"}):
        assert http.post("/page/log-out", headers=wrong).status_code == 403
    assert http.get("/config").status_code == 200


def test_whoever_logs_out_is_out_on_this_device_and_in_on_the_others(http, address):
    http.post("/login", data=ANNA)
    cookies = dict(http.cookies)
    with httpx.Client(base_url=address) as elsewhere:
        elsewhere.post("/login", data=ANNA)
        token = http.get("/page/state").json()["logOutToken"]
        assert elsewhere.post("/page/log-out", headers={"X-Token": token}).status_code == 403
        assert http.post("/page/log-out", headers={"X-Token": token}).status_code == 204
        assert http.get("/page/state").status_code == 401
        assert not http.cookies
        http.cookies.update(cookies)  # kept by somebody
        assert http.get("/config").status_code == 401
        assert elsewhere.get("/config").status_code == 200


@pytest.mark.parametrize("wrong", [{"password": "sesame"}, {"password": ""}, {"username": "berta"}, {"username": ""}])
def test_a_wrong_name_or_password_stays_outside(http, wrong):
    assert http.post("/login", data={**ANNA, **wrong}).status_code in (400, 422)
    assert http.get("/config").status_code == 401


@pytest.mark.parametrize(
    "body",
    [
        {"json": {"username": "anna"}},
        {"data": {"username": "anna"}},
        {"data": {"username": "a" * 2000, "password": "x"}},
        {"files": {"username": b"anna"}},
        {"content": b"\xff", "headers": {"Content-Type": "multipart/form-data"}},
    ],
    ids=["JSON", "no password", "long", "a file", "no form"],
)
def test_what_is_no_login_is_refused_calmly(http, body, capsys):
    assert http.post("/login", **body).status_code == 400
    assert "Traceback" not in capsys.readouterr().err


def test_a_new_password_ends_the_sessions_of_its_user_and_of_nobody_else(auth_file, settings, monkeypatch):
    users = login.Users({"anna": "1", "bert": "1"})
    monkeypatch.setattr(login, "_fits", lambda hashed, password: hashed == password)
    with (
        serving(ScriptedChat(), replace(settings, auth_file=auth_file), users) as address,
        httpx.Client(base_url=address) as anna,
        httpx.Client(base_url=address) as bert,
    ):
        for http, name in ((anna, "anna"), (bert, "bert")):
            assert http.post("/login", data={"username": name, "password": "1"}).status_code == 200
        users.replace(login.Users({"anna": "2", "bert": "1"}))
        assert (anna.get("/page/state").status_code, anna.get("/config").status_code) == (401, 401)
        assert bert.get("/page/state").status_code == 200
        assert anna.post("/login", data={"username": "anna", "password": "1"}).status_code == 400
        assert anna.post("/login", data={"username": "anna", "password": "2"}).status_code == 200


@pytest.mark.slow
def test_gradio_client_gets_in_with_the_password_only(address):
    Client(address, auth=tuple(ANNA.values()), verbose=False)
    with pytest.raises(ValueError, match="Could not login"):
        Client(address, auth=("anna", "sesame"), verbose=False)


def test_the_api_is_no_way_around_the_login(http):
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert answer.status_code == 401
    assert "API_KEY" in answer.json()["error"]["message"]
    assert http.get("/healthz").status_code == 503  # for whoever watches over the server


def test_the_same_password_never_gives_the_same_line():
    assert login.hash_password("a") != login.hash_password("a")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("anna:sesame", "Line 1 of AUTH_FILE"),
        ("# nobody\n", "names no user"),
        ("anna:scrypt$1$2$3$4", "is not name:hash"),
        ("anna:bcrypt$1$8$1$YQ==$YQ==", "is not name:hash"),
        (None, "cannot be read: No such file"),
    ],
    ids=["a bare password", "empty", "cut off", "another hash", "no file"],
)
def test_a_file_that_lets_nobody_in_is_told_at_the_start(tmp_path, text, sentence):
    path = tmp_path / "users.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ChatError, match=sentence):
        login.read_users(path)


@pytest.mark.slow
def test_the_start_ends_with_a_sentence_if_the_file_is_not_there(tmp_path):
    command = [sys.executable, "app.py", "--port", "0", "--auth-file", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_read_again_ends_the_sessions_of_whoever_changed_and_one_that_is_broken_changes_nothing(
    tmp_path,
):
    path, ended = tmp_path / "users.txt", []
    anna, bert = (login.hash_password("x") for _ in range(2))
    path.write_text(f"anna:{anna}\nbert:{bert}\n")
    users = login.read_users(path)
    users.on_change = ended.append
    path.write_text("anna:sesame\n")
    login.read_again(users, path)
    assert (len(users), ended) == (2, [])
    path.write_text(f"anna:{anna}\n")
    login.read_again(users, path)
    assert (len(users), ended) == (1, [{"bert"}])


@pytest.mark.slow
def test_sighup_reads_the_file_again_and_the_server_goes_on(tmp_path):
    path = tmp_path / "users.txt"
    path.write_text(f"anna:{login.hash_password('x')}\n")
    command = [sys.executable, "app.py", "--port", "0", "--auth-file", str(path)]
    environ = os.environ | {"INFERENCE_URL": "http://127.0.0.1:9"}
    folder = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=folder, env=environ, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = next(line for line in server.stderr if "The page is at" in line).split()[-1]
            with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=50)) as http:
                assert http.post("/login", data={"username": "anna", "password": "x"}).status_code == 200
                path.write_text(f"bert:{login.hash_password('y')}\n")
                server.send_signal(signal.SIGHUP)
                assert next(line for line in server.stderr if "1 may log in" in line)
                assert http.get("/page/state").status_code == 401
                assert http.post("/login", data={"username": "bert", "password": "y"}).status_code == 200
        finally:
            server.terminate()


def make_line(monkeypatch, name, *passwords):
    typed = iter(passwords)
    monkeypatch.setattr("builtins.input", lambda: name)
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(typed))
    return login.main()


@pytest.mark.slow
def test_the_helper_makes_a_line_that_lets_its_password_in(monkeypatch, capsys, tmp_path):
    assert make_line(monkeypatch, " carl ", "secret", "secret") == 0
    line = capsys.readouterr().out
    assert "secret" not in line
    (tmp_path / "users.txt").write_text(line)
    users = login.read_users(tmp_path / "users.txt")
    assert asyncio.run(users.knows("carl", "secret"))
    assert not asyncio.run(users.knows("carl", "Secret"))


def test_the_helper_makes_no_line_of_two_different_passwords(monkeypatch, capsys):
    assert make_line(monkeypatch, "carl", "secret", "sceret") == 1
    assert capsys.readouterr().out == ""
