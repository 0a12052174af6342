"""Which servers may be asked, and which keys they get."""

import pytest
from densegrpo.engine.rewards.remote import address
from densegrpo.engine.rewards.remote.address import connect

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.delenv("DENSEGRPO_REWARD_HOSTS", raising=False)
    monkeypatch.setattr(address, "HOST_SOURCES", [])


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "http://LOCALHOST:8000/v1",
        "http://127.0.0.1:8000/v1/",
        "https://127.9.8.7/",
        "http://[::1]:30000/v1",
    ],
)
def test_this_machine_may_always_be_asked(url):
    server = connect(url)
    assert server.loopback
    assert not server.url.endswith("/")


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost.evil.com",
        "http://127.0.0.1.evil.com",
        "http://evil.com/127.0.0.1",
        "http://evil.com:80/localhost",
        "http://0.0.0.0:8000",
        "http://127.1:8000",
        "http://2130706433:8000",
        "http://0x7f.0.0.1:8000",
        "http://192.168.0.7:8000",
        "http://[::2]:8000",
        "http://my.localhost",
    ],
)
def test_hosts_that_only_look_like_this_machine_are_refused(url):
    with pytest.raises(ValueError, match=r"host '.*' of .* is not allowed.*images and prompts.*DENSEGRPO_REWARD_HOSTS"):
        connect(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "//127.0.0.1",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://",
        "http://127.0.0.1@evil.com/",
        "http://user:password@127.0.0.1/",
        "http://evil.com\\@127.0.0.1/",
        "http://127.0.0.1\\@evil.com/",
        "http://127.0.0.1:8000/interrupt?x=",
        "http://127.0.0.1:8000/interrupt#",
        "http://127.0.0.1:0",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:x",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/a\r\nHost: evil.com",
        "http://127.0.0.1/%2e",
        "http://loc\u0430lhost",
        "http://\u24d8ocalhost",
        "http://[::1",
        "http://[localhost]",
    ],
)
def test_what_is_no_plain_address_is_refused(url, monkeypatch):
    monkeypatch.setenv("DENSEGRPO_REWARD_HOSTS", "evil.com")
    with pytest.raises(ValueError, match=r"like http://127|such as http://127"):
        connect(url)


@pytest.mark.parametrize(
    ("hosts", "url"),
    [
        ("judge.lan", "http://judge.lan:8000/v1"),
        ("judge.lan", "https://judge.lan"),
        (" other.lan , JUDGE.lan:8000 ,", "http://judge.LAN:8000"),
        ("judge.lan:443", "https://judge.lan"),
        ("10.0.0.7:8000", "http://10.0.0.7:8000"),
        ("[fd00::7]:8000", "http://[fd00::7]:8000"),
    ],
)
def test_a_host_that_the_user_named_may_be_asked(hosts, url, monkeypatch):
    monkeypatch.setenv("DENSEGRPO_REWARD_HOSTS", hosts)
    assert not connect(url).loopback


@pytest.mark.parametrize(
    ("hosts", "url"),
    [
        ("judge.lan:8000", "http://judge.lan:8001"),
        ("judge.lan:443", "http://judge.lan"),
        ("judge.lan", "http://evil.judge.lan"),
        ("judge.lan", "http://judge.lan.evil.com"),
        ("judge.lan", "http://xjudge.lan"),
    ],
)
def test_the_users_settings_open_no_other_host_or_port(hosts, url, monkeypatch):
    monkeypatch.setenv("DENSEGRPO_REWARD_HOSTS", hosts)
    with pytest.raises(ValueError, match="is not allowed"):
        connect(url)


@pytest.mark.parametrize("hosts", ["http://judge.lan", "*", "judge.lan:x", "a b", "user@judge.lan", "judge.lan/v1"])
def test_a_setting_that_is_no_host_is_refused(hosts, monkeypatch):
    monkeypatch.setenv("DENSEGRPO_REWARD_HOSTS", hosts)
    with pytest.raises(ValueError, match=r"DENSEGRPO_REWARD_HOSTS: .* must be a host or host:port, such as"):
        connect("http://judge.lan")


def test_the_message_for_a_refused_host_says_exactly_what_to_set(monkeypatch):
    with pytest.raises(ValueError, match="is not allowed") as refused:
        connect("http://judge.lan:8000/v1")
    setting = str(refused.value).split("DENSEGRPO_REWARD_HOSTS to ")[1].split(" ")[0]
    monkeypatch.setenv("DENSEGRPO_REWARD_HOSTS", setting)
    assert connect("http://judge.lan:8000/v1").url == "http://judge.lan:8000/v1"


def test_a_host_program_can_name_hosts(monkeypatch):
    monkeypatch.setattr(address, "HOST_SOURCES", [lambda: ["judge.lan:8000"]])
    assert connect("http://judge.lan:8000").url == "http://judge.lan:8000"
    with pytest.raises(ValueError, match="is not allowed"):
        connect("http://judge.lan:8001")


def test_a_key_is_read_from_the_environment_and_not_shown(monkeypatch):
    monkeypatch.setenv("DENSEGRPO_JUDGE_API_KEY", f" {KEY}\n")
    server = connect("http://127.0.0.1:8000", "DENSEGRPO_JUDGE_API_KEY")
    assert server.key == KEY
    assert KEY not in repr(server)


@pytest.mark.parametrize(
    "variable",
    [
        "OPENAI_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "PATH",
        "DENSEGRPO_REWARD_HOSTS",
        "densegrpo_api_key",
        KEY,
        "XDENSEGRPO_API_KEY",
        "DENSEGRPO_API_KEYS",
        "DENSEGRPO_API_KEY\n",
        "DENSEGRPO_A b_API_KEY",
    ],
)
def test_a_workflow_cannot_ask_for_variables_that_are_not_meant_for_rewards(variable, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match=r"must start with DENSEGRPO_ and end with API_KEY") as refused:
        connect("http://127.0.0.1:8000", variable)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("value", ["", "  ", "two words", "line\nbreak", "schl\u00fcssel"])
def test_a_key_that_is_none_is_refused_without_being_shown(value, monkeypatch):
    monkeypatch.setenv("DENSEGRPO_API_KEY", value)
    with pytest.raises(
        ValueError, match=r"environment variable DENSEGRPO_API_KEY (is not set|holds characters)"
    ) as bad:
        connect("http://127.0.0.1:8000", "DENSEGRPO_API_KEY")
    assert not value.strip() or value not in str(bad.value)


def test_a_key_never_travels_unencrypted(monkeypatch):
    monkeypatch.setenv("DENSEGRPO_REWARD_HOSTS", "judge.lan")
    monkeypatch.setenv("DENSEGRPO_API_KEY", KEY)
    with pytest.raises(ValueError, match=r"would travel unencrypted to judge\.lan; use its https address") as refused:
        connect("http://judge.lan", "DENSEGRPO_API_KEY")
    assert KEY not in str(refused.value)
    assert connect("https://judge.lan", "DENSEGRPO_API_KEY").key == KEY


def test_the_key_is_not_even_read_for_a_host_that_is_not_allowed(monkeypatch):
    monkeypatch.setattr(address, "read_key", lambda variable: pytest.fail("read"))
    with pytest.raises(ValueError, match="is not allowed"):
        connect("https://evil.com", "DENSEGRPO_API_KEY")
