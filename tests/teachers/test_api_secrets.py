"""No key, credential or content of a response is in any message, log or file."""

import logging

import pytest
from helpers.api_toys import SECRET, inputs

from bdistil import HttpEndpoint, RunError, UserError

KEY = "k3y-t0-the-api"


@pytest.mark.parametrize("url", [f"http://u:{KEY}@h/p", f"http://h/p?key={KEY}", f"http://{KEY}@h", f"http://h/#{KEY}"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="without user, password, query or fragment") as caught:
        HttpEndpoint(url)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://h/p", "h/p", "", "http://", "http://[1/"])
def test_what_is_no_address(url):
    with pytest.raises(UserError, match="to be like https://host/path"):
        HttpEndpoint(url)


def test_the_key_comes_from_the_environment(api, make, monkeypatch):
    with pytest.raises(UserError, match=r"environment variable TOY_KEY \(`key_env`\)"):
        HttpEndpoint(api.url, key_env="TOY_KEY")
    monkeypatch.setenv("TOY_KEY", KEY)
    make(HttpEndpoint(api.url, key_env="TOY_KEY"))(inputs(1))
    assert api.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_what_is_no_key(api, monkeypatch, key):
    monkeypatch.setenv("TOY_KEY", key)
    with pytest.raises(UserError, match="to hold the key of the API, one line of ASCII"):
        HttpEndpoint(api.url, key_env="TOY_KEY")


def test_no_password_of_netrc_is_sent(api, make, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    make(api)(inputs(1))
    assert api.keys == [None]


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    "fault",
    [401, 404, *[[f] * 3 for f in (500, "slow", "hang up")], "half", "nan", "words", "no json", "down"],
    ids=str,
)
def test_no_secret_is_in_any_message_or_log(api, make, monkeypatch, caplog, fault):
    monkeypatch.setenv("TOY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    endpoint = HttpEndpoint("http://127.0.0.1:9/none" if fault == "down" else api.url, key_env="TOY_KEY", timeout=0.3)
    teacher = make(endpoint, retries=2)
    api.faults = fault if isinstance(fault, list) else [fault] * 3
    with pytest.raises(RunError) as caught:
        teacher(inputs(4))
    for error in chain(caught.value):
        said = repr(error) + str(vars(error))
        assert KEY not in said
        assert SECRET not in said
        assert "127.0.0.1" not in said
    shown = caplog.text + repr(teacher) + str(vars(endpoint)) + str(vars(teacher))
    shown += (teacher.cache.path).read_bytes().decode("latin1")
    assert KEY not in shown
    assert SECRET not in shown
