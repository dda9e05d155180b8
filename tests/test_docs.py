"""What the pages say is so: options, links, file trees, metric keys."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "pyproject.toml").is_file())
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "packages/*/*.md")
    for path in ROOT.glob(pattern)
    if not path.name.startswith(".")
)
WRITTEN = sorted(
    [*PAGES, ROOT / "Makefile", ROOT / "pyproject.toml"]
    + [path for folder in ("docs", "examples", "benchmarks") for path in (ROOT / folder).glob("*.*")]
    + list((ROOT / "packages").glob("*/src/**/*.py"))
)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """docs/generate_cli.py as a module."""
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_fresh(generator):
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == generator.page(), "run `make docs`"


def test_every_command_is_on_the_page_of_options(generator):
    assert {name for name, _ in generator.commands()} == set(generator.CONFIGS)


def test_every_option_of_every_command_has_a_help_text(generator):
    from rlhf_cli.options import options

    for command, config in generator.CONFIGS.items():
        silent = [name for name, field, _ in options(config) if len(field.description or "") < 10]
        assert silent == [], command
    for command, parsed in generator.commands():
        assert [p.name for p in parsed.params if not (p.help or "").strip()] == [], command


def test_the_readme_names_every_package():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## Files")[1]
    assert [name for name in PACKAGES if f"{name}/" not in tree] == []


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "rlhf-losses"])
def test_the_readme_of_a_package_names_every_module(package):
    """The losses have a table of functions instead."""
    readme = (ROOT / "packages" / package / "README.md").read_text(encoding="utf-8")
    source = ROOT / "packages" / package / "src" / package.replace("-", "_")
    modules = [path for path in source.rglob("*.py") if path.name != "__init__.py"]
    assert [named(path) for path in modules if str(path.relative_to(source)) not in readme] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_changelog_of_a_package_has_its_version(package):
    folder = ROOT / "packages" / package
    (version,) = re.findall(r'^version = "(.+)"$', (folder / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert f"## [{version}]" in (folder / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("sft", {}, {"loss", "eval_perplexity", "tokens_per_second"}),
        ("rm", {}, {"accuracy", "eval_calibration_error", "eval_accuracy_up_to_64_tokens"}),
        ("dpo", {}, {"kl", "nll_loss", "eval_chosen_logps"}),
        ("dpo", {"loss_type": "simpo"}, {"reward_margin"}),
        ("kto", {}, {"kl", "desirable_reward", "eval_reward_margin"}),
        ("kd", {"on_policy_fraction": 0.5, "generate_max_len": 4}, {"on_policy_length", "eval_kd_loss"}),
    ],
)
def test_every_logged_metric_is_explained(method, options, expected, sft, train, rlhf, metrics, tmp_path):
    options |= {"eval_ratio": 0.3, "max_samples": 20}
    answer = rlhf(sft(**options) if method == "sft" else train(method, **options))
    assert answer.code == 0, answer.err
    logged = {key for row in metrics(tmp_path / "out") for key in row}
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert expected <= logged <= explained


@pytest.mark.parametrize(
    "given",
    [
        {"advantage_estimator": "gae", "pretrain_data": "text.jsonl", "n_samples_per_prompt": 1, "importance_cap": 2.0},
        {
            "advantage_estimator": "grpo",
            "use_kl_loss": True,
            "overlong_buffer_len": 2,
            "eval_ratio": 0.5,
            "save_steps": 1,
        },
    ],
    ids=["critic", "groups"],
)
def test_every_logged_metric_of_ppo_is_explained(given, tiny, metrics, tmp_path, monkeypatch):
    """In this process, without Ray and vLLM: what these log besides is in the tests of the engines."""
    from rlhf_data.options import build
    from rlhf_ray.cluster.backend import LocalBackend
    from rlhf_ray.config import PPOConfig
    from rlhf_ray.run import train

    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text("def reward(responses):\n    return [len(response) for response in responses]\n")
    Path("prompts.jsonl").write_text('{"prompt": "One"}\n{"prompt": "Two"}\n' * 4)
    Path("text.jsonl").write_text('{"text": "Once upon a time"}\n' * 4)
    given = {
        "pretrain": str(tiny), "prompt_data": "./prompts.jsonl", "reward_pretrain": "reward.py", "rollout_batch_size": 8,
        "train_batch_size": 8, "n_samples_per_prompt": 4, "generate_max_len": 4, "prompt_max_len": 16, "save_path": "out",
        "zero_stage": 0, "max_rollouts": 1,
    } | given  # fmt: skip
    given |= {name: f"./{given[name]}" for name in ("pretrain_data",) if name in given}
    train(build(PPOConfig, given), backend=LocalBackend())
    logged = {key for row in metrics(tmp_path / "out") for key in row if not re.match(r"(eval_)?reward_reward", key)}
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert {"reward", "entropy", "seconds_update"} <= logged
    assert logged <= set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))


def test_the_buckets_of_lengths_are_explained():
    from rlhf_core.methods.rm import BUCKETS

    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = [*(f"up_to_{limit}" for limit in BUCKETS), f"over_{BUCKETS[-1]}"]
    assert [name for name in names if f"| `eval_accuracy_{name}_tokens` |" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_relative_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target


@pytest.mark.parametrize("path", WRITTEN, ids=named)
def test_no_file_holds_a_path_of_a_machine(path):
    found = re.findall(
        r"(?<![\w.:/{}$~-])/(?:work|root|home|Users|mnt|tmp|data)/[\w./-]*", path.read_text(encoding="utf-8")
    )
    assert found == []


def test_every_command_in_the_pages_is_one_that_exists(generator):
    known = set(generator.CONFIGS)
    for page in PAGES:
        blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for words in re.findall(r"(?:^|run )(rlhf(?: [a-z][\w-]+)+)", "\n".join(blocks), flags=re.MULTILINE):
            assert any(words.startswith(command) for command in known), f"{named(page)}: {words}"


@pytest.fixture(scope="module")
def flags_of(generator: ModuleType) -> dict[str, set[str]]:
    """Every flag that a command takes, by command."""
    from rlhf_cli.options import markers, options
    from rlhf_data.config import Alias

    found = {command: {flag for p in parsed.params for flag in p.opts} for command, parsed in generator.commands()}
    for command, config in generator.CONFIGS.items():
        for name, field, _ in options(config):
            found[command] |= {f"--{name}"} | {
                f"--{extra.name}" for extra in markers(field) if isinstance(extra, Alias)
            }
            found[command] |= {f"--no_{name}"} if field.annotation in (bool, bool | None) else set()
    return found


def test_every_flag_in_the_pages_is_an_option(flags_of):
    """Those of other programs, and those of OpenRLHF that we do not have, are listed here."""
    known = {"--help", "--version", "--no_"}
    known |= {"--group", "--no_local_rank", "--nproc_per_node", "--module", "--no_group", "--extra"}
    known |= {"--csft_prompt", "--address", "--head"}
    known |= {"--ring_attn_size", "--ring_head_stride", "--disable_trace_cache", "--is_rm", "--normalize_reward"}
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'add_argument\("(--\w+)"', benchmark.read_text(encoding="utf-8")))
    known = known.union(*flags_of.values())
    for page in (page for page in PAGES if page.name != "CONTRIBUTING.md"):
        flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8"))
        assert {"--" + flag[2:].replace("-", "_") for flag in flags} - known == set(), named(page)


def test_every_command_in_the_pages_takes_its_flags(generator, flags_of):
    for path in (*PAGES, *(ROOT / "examples").glob("*.sh")):
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) if path.suffix == ".md" else [text]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        for command in generator.CONFIGS:
            known = flags_of[command] | {"--help"}
            for line in (line for line in lines if re.match(rf"(?:uv run )?{command}\b", line)):
                flags = {"--" + flag[2:].replace("-", "_") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", line)}
                assert flags <= known, f"{named(path)}: {line}"


def test_the_first_command_of_the_readme_starts_without_options(monkeypatch):
    import sys

    from rlhf_cli.main import main

    started = []
    monkeypatch.setattr("rlhf_cli.quickstart.quickstart", started.append)
    monkeypatch.setattr(sys, "argv", ["rlhf", "quickstart"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert [config.folder for config in started] == ["quickstart"]
