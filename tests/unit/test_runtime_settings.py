"""Settings: file, environment, secret files; every fault named, none of them twice."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from marshmallow import Schema, fields, validate

from deskfleet.runtime.secret import Secret, strike
from deskfleet.runtime.settings import SecretField, SettingsError, load


class Directory(Schema):
    url = fields.String(required=True)
    bind_password = SecretField(load_default=None, validate=validate.Length(8))


class Portal(Schema):
    listen = fields.String(load_default="127.0.0.1:8000")
    workers = fields.Integer(load_default=2, validate=validate.Range(1, 64))
    secret = SecretField(required=True, validate=validate.Length(16))
    title = fields.String(load_default="Desktops")
    directories = fields.List(fields.Nested(Directory), load_default=list)
    primary = fields.Nested(Directory, load_default=None)


class Agent(Schema):
    host = fields.String(required=True)
    cert_file = fields.String(load_default="")


SECRET = "correct-horse-battery"


def read(
    tmp_path: Path, text: str, environ: dict[str, str] | None = None, known: tuple[str, ...] = ("agent",)
) -> dict[str, Any]:
    path = tmp_path / "deskfleet.toml"
    path.write_text(text)
    return load(path, {"portal": Portal()}, environ or {}, known)


def problems(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text, environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def secret_file(tmp_path: Path, text: str = SECRET + "\n", mode: int = 0o600) -> Path:
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_defaults_values_and_other_services_sections(tmp_path: Path) -> None:
    made = read(tmp_path, f'[portal]\nsecret = "{SECRET}"\nworkers = 4\n[agent]\nanything = 1\n')
    assert set(made) == {"portal"}
    assert made["portal"]["workers"] == 4 and made["portal"]["listen"] == "127.0.0.1:8000"
    assert made["portal"]["secret"].reveal() == SECRET


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    text = """
        stray = 1
        [portl]
        x = 1
        [portal]
        worker = 3
        workers = 65
        listen = 8
        [[portal.directories]]
        url = "ldaps://a"
        [[portal.directories]]
        bind_passwort = "x"
    """
    assert sorted(problems(tmp_path, text, {"DESKFLEET_PORTALS__X": "1", "DESKFLEET_PORTAL__": "1"})) == sorted(
        [
            "stray: must stand in a section; sections are agent, portal",
            "portl: unknown section; did you mean 'portal'?",
            "DESKFLEET_PORTALS__X: unknown section 'portals'; did you mean 'portal'?",
            "DESKFLEET_PORTAL__: a key is missing",
            "portal.worker: unknown key; did you mean 'workers'?",
            "portal.workers: Must be greater than or equal to 1 and less than or equal to 64.",
            "portal.listen: Not a valid string.",
            "portal.secret: Missing data for required field.",
            "portal.directories[1].url: Missing data for required field.",
            "portal.directories[1].bind_passwort: unknown key; did you mean 'bind_password'?",
        ]
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), (b"[portal\n", "is not TOML"), (b"\xff", "is not UTF-8")],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "deskfleet.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=problem) as caught:
        load(path, {"portal": Portal()}, {})
    assert str(path) in str(caught.value)


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    environ = {
        "DESKFLEET_PORTAL__WORKERS": "7",
        "DESKFLEET_PORTAL__SECRET": "1234567890123456",
        "DESKFLEET_PORTAL__TITLE": "Rechner für alle",
        "DESKFLEET_PORTAL__LISTEN": '"[::1]:80"',
        "DESKFLEET_PORTAL__PRIMARY__URL": "ldaps://x",
        "DESKFLEET_PORTAL__DIRECTORIES": '[{url = "ldaps://a"}]',
        "DESKFLEET_AGENT__HOST": "another service's",
        "DESKFLEET_CONFIG": "no setting",
        "OTHER_PORTAL__WORKERS": "9",
    }
    portal = read(tmp_path, f'[portal]\nworkers = 4\nsecret = "{SECRET}"\n', environ)["portal"]
    assert (portal["workers"], portal["title"], portal["listen"]) == (7, "Rechner für alle", "[::1]:80")
    assert portal["secret"].reveal() == "1234567890123456"
    assert portal["primary"]["url"] == "ldaps://x"
    assert [d["url"] for d in portal["directories"]] == ["ldaps://a"]


def test_text_cannot_smuggle_a_second_value(tmp_path: Path) -> None:
    environ = {"DESKFLEET_PORTAL__TITLE": '"a"\nworkers = 9'}
    portal = read(tmp_path, f'[portal]\nsecret = "{SECRET}"\n', environ)["portal"]
    assert portal["title"] == '"a"\nworkers = 9' and portal["workers"] == 2


def test_a_value_in_place_of_a_table_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, f'[portal]\nsecret = "{SECRET}"\n', {"DESKFLEET_PORTAL__TITLE__X": "1"})
    # "title" is text in the schema, so a table there is not valid text.
    assert found == ["portal.title: Not a valid string."]
    found = problems(tmp_path, f'[portal]\nsecret = "{SECRET}"\ntitle = "t"\n', {"DESKFLEET_PORTAL__TITLE__X": "1"})
    assert found == ["DESKFLEET_PORTAL__TITLE__X: 'title' is not a table"]


def test_a_secret_comes_from_its_file(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    assert read(tmp_path, f'[portal]\nsecret_file = "{path}"\n')["portal"]["secret"].reveal() == SECRET
    text = f'[portal]\nsecret_file = "{path}"\n[[portal.directories]]\nurl = "u"\nbind_password_file = "{path}"\n'
    assert read(tmp_path, text)["portal"]["directories"][0]["bind_password"].reveal() == SECRET


def test_a_key_of_the_schema_that_ends_in_file_is_just_a_key(tmp_path: Path) -> None:
    path = tmp_path / "deskfleet.toml"
    path.write_text('[agent]\nhost = "h1"\ncert_file = "/nowhere"\n')
    assert load(path, {"agent": Agent()}, {})["agent"]["cert_file"] == "/nowhere"


def test_the_environment_replaces_the_other_way_to_give_a_value(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    by_file = read(tmp_path, '[portal]\nsecret = "in the file"\n', {"DESKFLEET_PORTAL__SECRET_FILE": str(path)})
    assert by_file["portal"]["secret"].reveal() == SECRET
    by_value = read(tmp_path, '[portal]\nsecret_file = "/gone"\n', {"DESKFLEET_PORTAL__SECRET": "from-the-environment"})
    assert by_value["portal"]["secret"].reveal() == "from-the-environment"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610])
def test_a_secret_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, mode=mode)
    found = problems(tmp_path, f'[portal]\nsecret_file = "{path}"\n')
    assert found == [f"portal.secret_file: {path} is open to others than its owner (mode {mode:04o}); chmod 600 it"]


def test_a_systemd_credential_may_have_any_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskfleet.runtime.settings._CREDENTIALS", tmp_path)
    path = secret_file(tmp_path, mode=0o440)
    assert read(tmp_path, f'[portal]\nsecret_file = "{path}"\n')["portal"]["secret"].reveal() == SECRET


def test_a_link_out_of_the_credentials_folder_is_no_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    monkeypatch.setattr("deskfleet.runtime.settings._CREDENTIALS", folder)
    (folder / "link").symlink_to(secret_file(tmp_path, mode=0o644))
    assert "is open to others" in problems(tmp_path, f'[portal]\nsecret_file = "{folder}/link"\n')[0]


def test_odd_secret_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "big").write_bytes(b"x" * 70_000)
    (tmp_path / "empty").write_text("\n")
    for name in ("binary", "big", "empty"):
        (tmp_path / name).chmod(0o600)
    expected = {
        f"{tmp_path}/pipe": "is not a regular file",
        f"{tmp_path}": "is not a regular file",
        f"{tmp_path}/binary": "is not UTF-8",
        f"{tmp_path}/big": "is larger than 65536 bytes",
        f"{tmp_path}/empty": "is empty",
        f"{tmp_path}/missing": "cannot be opened: No such file or directory",
        "relative": "must be the absolute path of a file",
    }
    for name, problem in expected.items():
        found = problems(tmp_path, f'[portal]\nsecret_file = "{name}"\n')
        assert len(found) == 1 and problem in found[0], found
    assert "absolute" in problems(tmp_path, "[portal]\nsecret_file = 7\n")[0]
    assert "null" in problems(tmp_path, '[portal]\nsecret_file = "/a\\u0000b"\n')[0]


def test_value_and_file_together_are_refused(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    found = problems(tmp_path, f'[portal]\nsecret = "{SECRET}"\nsecret_file = "{path}"\n')
    assert found == ["portal.secret_file: secret is set as well; keep one of the two"]


def test_no_message_shows_a_secret(tmp_path: Path) -> None:
    found = problems(tmp_path, '[portal]\nsecret = "short-one"\n[[portal.directories]]\nbind_password = "tiny"\n')
    assert "short-one" not in "".join(found) and "tiny" not in "".join(found)


def test_a_secret_hides_itself() -> None:
    secret = Secret("hidden-value/1")
    assert {str(secret), repr(secret), f"{secret}", f"{secret!r}", format(secret), str([secret])} == {
        "***",
        "[***]",
    }
    assert secret == Secret("hidden-value/1") and secret != Secret("other-value") and secret != "hidden-value/1"
    assert hash(secret) == hash(Secret("hidden-value/1")) and len(secret) == 14
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    assert strike("x hidden-value/1 hidden-value%2F1 y") == "x *** *** y"
