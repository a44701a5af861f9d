"""The local authority and its certificate: what is in them, when they change, and who can read the files."""

import ipaddress
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from llama2_chat.errors import ChatError
from llama2_chat.server.hosts import own_hosts
from llama2_chat.server.local_ca import local_certificate
from tests.support.certificates import DAY, FILES, HOSTS, NOW, SELF_SIGNED, contents, names_in, openssl, read


def test_the_certificate_is_for_every_host_as_a_server_and_for_397_days_at_most(folder):
    local_certificate(folder, hosts=HOSTS)
    leaf = read(folder / "server.crt")
    assert names_in(folder / "server.crt") == set(HOSTS)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc < 397 * DAY
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        x509.ExtendedKeyUsageOID.SERVER_AUTH
    ]


def test_the_ca_is_for_10_years_and_its_constraints_are_critical(folder):
    local_certificate(folder, hosts=HOSTS, now=NOW)
    ca = read(folder / "ca.crt")
    constraints = ca.extensions.get_extension_for_class(x509.NameConstraints)
    permitted = {str(tree.value) for tree in constraints.value.permitted_subtrees}
    private = {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"}
    assert constraints.critical
    assert permitted == {"localhost", "local", "llama", "127.0.0.0/8", "::1/128", "fc00::/7", "fe80::/10"} | private
    assert ca.not_valid_after_utc > NOW + 3640 * DAY


def test_this_computers_hosts_are_its_names_and_its_private_addresses():
    hosts = own_hosts()
    assert {"localhost", "127.0.0.1", "::1"} <= set(hosts)
    assert any(host.endswith(".local") for host in hosts)
    addresses = [ipaddress.ip_address(host) for host in hosts if ":" in host or host.count(".") == 3]
    assert not any(address.is_global for address in addresses)


def test_a_computer_named_like_a_top_level_domain_gets_no_power_over_it(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Dev")  # the constraint `dev` would permit every site in .dev
    assert "dev" not in own_hosts()
    assert "dev.local" in own_hosts()


def test_another_start_changes_nothing(folder):
    local_certificate(folder, hosts=HOSTS, now=NOW)
    before = contents(folder)
    local_certificate(folder, hosts=reversed(HOSTS), now=NOW + 300 * DAY)
    assert contents(folder) == before


def test_a_certificate_near_its_end_is_renewed_and_the_ca_stays(folder):
    local_certificate(folder, hosts=HOSTS, now=NOW)
    before = contents(folder)
    renewed = local_certificate(folder, hosts=HOSTS, now=NOW + 370 * DAY)
    after = contents(folder)
    assert (after["ca.crt"], after["ca.key"]) == (before["ca.crt"], before["ca.key"])
    assert after["server.crt"] != before["server.crt"]
    assert renewed.not_after > NOW + 700 * DAY


@pytest.mark.parametrize("hosts", [(*HOSTS, "10.1.2.3"), HOSTS[:-2], (*HOSTS, "other.local")])
def test_when_the_addresses_change_the_certificate_follows_and_the_ca_stays(folder, hosts):
    local_certificate(folder, hosts=HOSTS)
    ca = (folder / "ca.crt").read_bytes()
    assert local_certificate(folder, hosts=hosts).hosts == hosts
    assert names_in(folder / "server.crt") == set(hosts)
    assert (folder / "ca.crt").read_bytes() == ca
    assert openssl("verify", "-CAfile", folder / "ca.crt", folder / "server.crt").returncode == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"now": NOW + 3640 * DAY}, "ends on "),
        ({"hosts": (*HOSTS, "renamed")}, "may not sign for renamed"),
    ],
    ids=["near its end", "new name"],
)
def test_a_ca_that_can_go_on_no_longer_is_replaced_and_the_log_says_so(folder, caplog, change, reason):
    local_certificate(folder, hosts=HOSTS, now=NOW)
    before = contents(folder)
    local_certificate(folder, **{"hosts": HOSTS, "now": NOW, **change})
    assert not set(before.values()) & set(contents(folder).values())
    assert reason in caplog.text
    assert "every device must trust the new ca.crt" in caplog.text


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_text("nothing"), lambda path: path.write_text("")]
)
@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_damaged_file_is_made_again(folder, name, damage):
    local_certificate(folder, hosts=HOSTS)
    before = contents(folder)
    damage(folder / name)
    local_certificate(folder, hosts=HOSTS)
    after = contents(folder)
    assert openssl("verify", "-CAfile", folder / "ca.crt", folder / "server.crt").returncode == 0
    assert (after["ca.crt"] == before["ca.crt"]) == name.startswith("server")


def test_a_clock_before_the_cas_time_is_named_and_the_ca_stays(folder):
    local_certificate(folder, hosts=HOSTS, now=NOW)
    before = contents(folder)
    with pytest.raises(ChatError, match=r"clock says 1970-01-01, before certs/ca\.crt was made\. Set the clock"):
        local_certificate(folder, hosts=HOSTS, now=datetime(1970, 1, 1, tzinfo=UTC))
    assert contents(folder) == before


def test_an_authority_that_was_not_made_here_is_left_alone(folder):
    folder.mkdir()
    openssl(*SELF_SIGNED, "-subj", "/CN=Mine", "-keyout", folder / "ca.key", "-out", folder / "ca.crt")
    before = (folder / "ca.key").read_bytes()
    with pytest.raises(ChatError, match="was not made here"):
        local_certificate(folder, hosts=HOSTS)
    assert (folder / "ca.key").read_bytes() == before


def test_programs_that_start_at_once_share_one_authority_and_one_certificate(folder):
    program = """
import sys, pathlib
from llama2_chat.server.announcement import fingerprint
from llama2_chat.server.local_ca import local_certificate
print("ready", flush=True)
sys.stdin.readline()
for number in range(8):
    made = local_certificate(pathlib.Path(sys.argv[1]) / str(number), hosts=["localhost"])
    print(fingerprint(made.ca), fingerprint(made.certfile))
"""
    command = [sys.executable, "-c", program, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    programs = [subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) for _ in range(3)]
    for program in programs:
        program.stdout.readline()
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    printed = [program.communicate()[0] for program in programs]
    assert printed[0].count("\n") == 8
    assert len(set(printed)) == 1


# ---- the files ----


@pytest.mark.skipif(os.name != "posix", reason="Windows has access lists instead")
def test_keys_are_for_their_owner_only_even_if_somebody_opened_them(folder, caplog):
    umask = os.umask(0)
    try:
        local_certificate(folder, hosts=HOSTS)
    finally:
        os.umask(umask)
    modes = {name: (folder / name).stat().st_mode & 0o777 for name in FILES}
    assert modes == {"ca.crt": 0o644, "ca.key": 0o600, "server.crt": 0o644, "server.key": 0o600}
    (folder / "ca.key").chmod(0o644)
    local_certificate(folder, hosts=HOSTS)
    assert (folder / "ca.key").stat().st_mode & 0o777 == 0o600
    assert "Other users could read" in caplog.text


def test_git_never_sees_the_folder(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    local_certificate(tmp_path / "anywhere", hosts=HOSTS)
    status = subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert status.stdout == ""


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "certs").write_text("a file")
    with pytest.raises(ChatError, match=r"certs cannot be read or written: .*--certfile and --keyfile"):
        local_certificate(tmp_path / "certs", hosts=HOSTS)
