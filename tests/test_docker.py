"""The image and the compose file, as far as they can be checked without a daemon: names, paths and ports must agree."""

from __future__ import annotations

import ast
import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import pytest

from finelip_fast import cli
from finelip_fast.serve.settings import ServeSettings

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Name and words of each instruction of the Dockerfile, with continued lines joined."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, words.strip()) for name, _, words in (line.partition(" ") for line in lines)]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    values: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))
    return values


def words(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [text for instruction, text in instructions if instruction == name]


def parse(command: list[str]) -> dict[str, Any]:
    """Return the values of a command's options; fail if one is unknown."""
    subcommand = cli.finelip.commands[command[0]]
    with subcommand.make_context(
        command[0], command[1:], parent=click.Context(cli.finelip, info_name="finelip")
    ) as context:
        return context.params


def test_what_is_copied_is_there_and_not_ignored(instructions) -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    exceptions = {line[1:] for line in patterns if line.startswith("!")}
    assert patterns[0] == "*"
    sources = [
        source for text in words(instructions, "COPY") if not text.startswith("--from") for source in text.split()[:-1]
    ]
    assert set(sources) == exceptions
    assert all((REPOSITORY / source).exists() for source in sources)
    assert not [name for name in exceptions if any(fnmatch(name, line) for line in patterns[1:] if line[0] != "!")]


def test_the_wheel_has_what_is_copied_and_the_extras_that_are_named(instructions) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    copied = " ".join(words(instructions, "COPY")).split()
    folders = {value.split("/")[0] for value in project["tool"]["setuptools"]["package-dir"].values()}
    assert folders | {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"} <= set(
        copied
    )
    (extras,) = re.findall(r"\.whl\)\[([\w,-]+)\]", " ".join(words(instructions, "RUN")))
    assert {"serve"} <= set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    torch = next(line for line in project["project"]["dependencies"] if line.startswith("torch>"))
    assert f'"{torch}"' in " ".join(words(instructions, "RUN"))


def test_stages_that_are_copied_from_exist(instructions) -> None:
    stages = {text.split()[-1] for text in words(instructions, "FROM") if " AS " in text}
    assert set(re.findall(r"--from=(\w+)", " ".join(words(instructions, "COPY")))) == stages


def test_an_ordinary_user_runs_what_the_command_line_knows(instructions) -> None:
    names = [name for name, _ in instructions]
    (user,) = words(instructions, "USER")
    assert user != "root"
    assert f"-o {user}" in " ".join(words(instructions, "RUN"))
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert json.loads(words(instructions, "ENTRYPOINT")[0]) == ["finelip"]
    values = parse(json.loads(words(instructions, "CMD")[0]))
    assert (values["host"], values["port"]) == ("0.0.0.0", ServeSettings().port)
    assert values["index"] in json.loads(words(instructions, "VOLUME")[0])
    assert words(instructions, "EXPOSE") == [str(ServeSettings().port)]


def test_the_health_check_asks_the_port_that_is_served(instructions) -> None:
    check = json.loads(words(instructions, "HEALTHCHECK")[0].partition(" CMD ")[2])
    assert check[0] == "python"
    ast.parse(check[-1])
    assert f"'http://127.0.0.1:{ServeSettings().port}/health/ready'" in check[-1]


def test_services_write_where_they_may_and_nowhere_else(compose, instructions) -> None:
    volumes = set(json.loads(words(instructions, "VOLUME")[0]))
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        mounted = {volume.split(":")[-1 if volume.count(":") == 1 else -2]: volume for volume in service["volumes"]}
        assert volumes <= set(mounted)
        assert all(volume.endswith(":ro") for target, volume in mounted.items() if target not in volumes)
        named_volumes = {volume.split(":")[0] for target, volume in mounted.items() if target in volumes}
        assert named_volumes <= set(compose["volumes"])
        assert any(line.startswith("/tmp") for line in service["tmpfs"])


def test_services_see_the_same_pictures(compose) -> None:
    """Both need the folder, and a command without it is refused: a server would show no picture of an empty one."""
    (mounted,) = {
        tuple(name for name in service["volumes"] if ":/photos" in name) for service in compose["services"].values()
    }
    assert re.fullmatch(r"\$\{PHOTOS:\?[^}]*export PHOTOS=[^}]*\}:/photos:ro", *mounted)
    for path in ("compose.yaml", "docs/how-to/serve.md"):
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        assert re.search(r"export PHOTOS=.*\n(# +)?docker compose run --rm add.*\n(# +)?docker compose up", text)


def test_services_run_what_the_command_line_knows(compose) -> None:
    serve, add = (compose["services"][name] for name in ("serve", "add"))
    values = parse(serve["command"])
    assert serve["ports"] == [f"127.0.0.1:{values['port']}:{values['port']}"], "published on this machine alone"
    assert values["api_key_file"] == f"/run/secrets/{serve['secrets'][0]}"
    assert set(serve["secrets"]) == set(compose["secrets"])
    # As long as requests may take to end, and what follows.
    assert int(serve["stop_grace_period"].removesuffix("s")) >= values["drain"] + 10
    assert parse(add["command"])["index"] == values["index"]
    assert [line.split(":")[-2] for line in add["volumes"] if line.endswith(":ro")] == list(
        parse(add["command"])["sources"]
    )


def test_the_key_and_the_pictures_stay_out_of_the_image(compose) -> None:
    ignored = (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()
    (secret,) = (Path(values["file"]).name for values in compose["secrets"].values())
    assert f"/{secret}" in ignored
    assert shlex.split((REPOSITORY / ".dockerignore").read_text(encoding="utf-8"), comments=True)[0] == "*"
