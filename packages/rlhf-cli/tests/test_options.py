"""One option per config field, and back: names, groups, defaults, YAML, lists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from rlhf_cli.options import build, command, options, read_yaml, spread_lists
from rlhf_data.config import Alias, Config, Count
from rlhf_data.errors import InputError


class Engine(Config):
    """Engine."""

    power: Annotated[int, Field(ge=1, le=9)] = 4
    """How strong."""

    gears: Annotated[Count, Alias("speeds")] = 5
    """How many."""


class Car(Config):
    """Drive somewhere."""

    target: str
    """Where to."""

    engine: Engine = Engine()

    stops: list[str] = Field(default=["home"])
    """On the way."""

    quiet: bool = True
    """No radio."""

    range: tuple[float, float] = (0.1, 0.9)
    """From, to."""


@pytest.fixture
def drive():
    """Run the command line; returns the config it built, or the result if it failed."""
    app, built = typer.Typer(), []
    app.callback()(lambda: None)

    @command(app, "drive", Car)
    def run(config: Car) -> None:
        built.append(config)

    def invoke(*arguments: str):
        result = CliRunner().invoke(app, ["drive", *arguments])
        return built.pop() if built else result

    return invoke


def test_groups_flatten_and_nest_back(drive):
    assert [name for name, _, _ in options(Car)] == ["target", "power", "gears", "stops", "quiet", "range"]
    assert drive("--target", "x", "--power", "7") == Car(target="x", engine=Engine(power=7))


def test_defaults_are_the_configs_own(drive):
    assert drive("--target", "x") == Car(target="x") == build(Car, {"target": "x"})


def test_aliases_large_numbers_lists_pairs_and_switches(drive):
    car = drive(
        "--target", "x", "--speeds", "1e3", "--stops", "a", "b", "--stops", "c", "--no_quiet", "--range", "0.2", "0.3"
    )
    assert car == Car(target="x", engine=Engine(gears=1000), stops=["a", "b", "c"], quiet=False, range=(0.2, 0.3))


def test_lists_spread_only_for_list_options():
    assert spread_lists(["--stops", "a", "b", "--range", "1", "2"], Car) == [
        "--stops",
        "a",
        "--stops",
        "b",
        "--range",
        "1",
        "2",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "x", "--power", "10"], "--power: it should be less than or equal to 9, got '10'"),
        (["--target", "x", "--power", "abc"], "--power"),
        (["--power", "3"], "--target is required"),
        (["--target", "x", "--gears", "0", "--power", "0"], "--gears"),
    ],
)
def test_a_bad_value_names_the_option_and_the_value(drive, arguments, message):
    result = drive(*arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_yaml_gives_options_flags_win_and_groups_may_be_written_out(drive, tmp_path: Path):
    file = tmp_path / "car.yaml"
    file.write_text("target: y\nengine:\n  power: 6\nspeeds: 7\nrange: [1e-3, 5e-1]\n")
    assert drive("--config", str(file)) == Car(target="y", engine=Engine(power=6, gears=7), range=(0.001, 0.5))
    assert drive("--config", str(file), "--power", "2").engine.power == 2


def test_an_unknown_key_in_yaml_gets_the_nearest_name(tmp_path: Path):
    file = tmp_path / "car.yaml"
    file.write_text("targt: y\n")
    with pytest.raises(InputError, match="unknown option `targt`; did you mean `target`"):
        read_yaml(file, Car)


def test_two_groups_cannot_share_a_flag():
    class Trailer(Config):
        """Trailer."""

        power: int = 1
        """How strong."""

    class Train(Config):
        """Two engines."""

        engine: Engine = Engine()
        trailer: Trailer = Trailer()

    with pytest.raises(ValueError, match="share a flag: power"):
        command(typer.Typer(), "train", Train)(lambda config: None)
