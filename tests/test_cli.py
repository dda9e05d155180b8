"""The command line itself: instant help, the documented options, one declaration behind flags, files and records."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import pytest

from rlhf_cli.errors import reported

HEAVY = ("torch", "transformers", "datasets", "deepspeed", "numpy", "peft", "pyarrow", "wandb", "vllm", "ray")
SHOW_HEAVY = f"""
import sys
try:
    from rlhf_cli.main import main
    main()
except SystemExit as ended:
    print(f"exit {{ended.code or 0}}")
print("heavy:", *sorted(set({HEAVY}) & sys.modules.keys()))
"""


def imported_by(*arguments: str, first: str = "") -> tuple[str, list[str]]:
    """What a command printed, and which heavy modules it had imported by its end."""
    ran = subprocess.run(
        [sys.executable, "-c", first + SHOW_HEAVY, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    shown, _, heavy = ran.stdout.rpartition("heavy:")
    return shown, heavy.split()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        *[("train", method, "--help") for method in ("sft", "rm", "dpo", "kto", "kd")],
        ("data", "inspect", "-h"),
        ("quickstart", "-h"),
        ("chat", "-h"),
        ("--version",),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments):
    shown, heavy = imported_by(*arguments)
    assert "exit 0" in shown and heavy == []


def test_a_heavy_import_would_be_noticed():
    assert imported_by("--help", first="import numpy")[1] == ["numpy"]


def test_help_groups_every_option_and_says_its_default_and_bounds():
    shown, _ = imported_by("train", "sft", "--help")
    for panel in ("Model", "Data", "Batches", "Optimizer", "LoRA", "Parallelism", "Saving", "Logging", "This command"):
        assert f"─ {panel} ─" in shown
    assert "--max_epochs,--max_epoch" in shown and "N ≥ 1" in shown and "(2048)" in shown


def test_version(rlhf):
    assert rlhf(["--version"]).out.strip() == f"rlhf {version('rlhf-cli')}"


DOCUMENTED = r"""
    --zero_stage 2 | --adam_offload | --adam_betas 0.9 0.95 | --bf16 | --flash_attn | --gradient_checkpointing | --save_path ./other
    --use_wandb True | --learning_rate 5e-6 | --l2 0.1 | --lr_scheduler cosine | --max_norm 1.0 | --micro_train_batch_size 2
    --train_batch_size 16 | --aux_loss_coef 0 | --max_epoch 1 | --max_epochs 1 | --dataset_probs 1.0 | --input_key question
    --output_key response | --apply_chat_template | --input_template 'User: {}\nAssistant: ' | --max_len 64 | --max_samples 8 | --train_split train
    --eval_split test | --packing_samples | --load_in_4bit --lora_rank 4 | --lora_rank 4 | --lora_dropout 0.1
    --target_modules q_proj v_proj --lora_rank 4 | --tokenizer_chat_template {{messages}} | --pretrain_mode --input_key response
    --save_steps -1 | --logging_steps 1 | --eval_steps -1
"""
"""The options that usage.rst gives to every method, to data sets, to LoRA and to SFT (`--dataset` and `--pretrain` are in every run)."""


@pytest.mark.parametrize("line", [part.strip() for part in DOCUMENTED.replace("\n", "|").split("|") if part.strip()])
def test_every_documented_option_is_accepted(line, sft, rlhf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = rlhf(sft("--dry_run", *shlex.split(line)))
    assert answer.code == 0, answer.err
    assert "Plan" in answer.out


DOCUMENTED_OF = {
    "rm": """--prompt_key question | --chosen_key chosen --rejected_key rejected | --packing_samples | --value_head_prefix score
        --tokenizer_chat_template {{messages}} | --compute_fp32_loss | --loss sigmoid | --margin_loss""",
    "dpo": """--prompt_key question | --chosen_key chosen --rejected_key rejected | --packing_samples | --ref_offload | --beta 0.1 | --ipo
        --label_smoothing 0.1 | --nll_loss_coef 0.2 | --dataset_probs 1.0 | --ref_pretrain TINY""",
    "kto": """--input_key question --output_key response --label_key label | --ref_offload | --beta 0.1 | --desirable_loss_weight 1.3
        --undesirable_loss_weight 0.7 | --input_template 'User: {}\\nAssistant: ' | --packing_samples""",
    "kd": "--teacher_offload | --kd_coef 0.4 | --input_template 'User: {}\\nAssistant: ' | --packing_samples",
}
"""The options that usage.rst gives to the other methods."""


@pytest.mark.parametrize("method", DOCUMENTED_OF)
def test_every_documented_option_of_a_method_is_accepted(method, tiny, train, rlhf, tmp_path):
    for line in DOCUMENTED_OF[method].replace("\n", "|").replace("TINY", str(tiny)).split("|"):
        answer = rlhf(train(method, "--dry_run", *shlex.split(line)))
        assert answer.code == 0, (line, answer.err)
        assert "Plan" in answer.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "where", "value"),
    [
        (["--max-len", "64"], ("data", "max_len"), 64),
        (["--max_samples", "1e3"], ("data", "max_samples"), 1000),
        (["--adam_betas", "0.8", "0.9"], ("optim", "adam_betas"), (0.8, 0.9)),
        (["--target_modules", "q_proj", "v_proj"], ("lora", "target_modules"), ["q_proj", "v_proj"]),
        (
            ["--target-modules", "q_proj", "--target_modules", "v_proj"],
            ("lora", "target_modules"),
            ["q_proj", "v_proj"],
        ),
        (["--max_epoch", "3"], ("batch", "max_epochs"), 3),
        (["--num_gpus", "1"], ("parallel", "num_procs"), 1),
        (["--save_steps", "-1"], ("checkpoint", "save_steps"), -1),
        (["--learning_rate=5e-6"], ("optim", "learning_rate"), 5e-6),
        (["--input_template", "Q: {}\\nA: "], ("data", "input_template"), "Q: {}\\nA: "),
        (["--input_template", "None"], ("data", "input_template"), None),
        (["--bf16"], ("model", "bf16"), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_arrives_in_its_config(arguments, where, value, rlhf, monkeypatch):
    configs = []
    monkeypatch.setattr("rlhf_core.methods.sft.train", lambda config, **given: configs.append(config))
    assert rlhf(["train", "sft", "--pretrain", "m", "--dataset", "d", *arguments]).code == 0
    assert getattr(getattr(configs[0], where[0]), where[1]) == value


def test_what_is_not_given_has_the_default_of_the_config(rlhf, monkeypatch):
    from rlhf_core.config import ModelConfig, SFTConfig
    from rlhf_data.config import SFTDataConfig

    configs = []
    monkeypatch.setattr("rlhf_core.methods.sft.train", lambda config, **given: configs.append(config))
    assert rlhf(["train", "sft", "--pretrain", "m", "--dataset", "d"]).code == 0
    assert configs == [SFTConfig(model=ModelConfig(pretrain="m"), data=SFTDataConfig(dataset="d"))]


def test_no_two_options_of_a_command_share_a_flag():
    from rlhf_cli.infer import InferConfig
    from rlhf_cli.options import aliases_of, options
    from rlhf_cli.quickstart import QuickstartConfig
    from rlhf_cli.recipes.config import RECIPES
    from rlhf_core.config import DPOConfig, KDConfig, KTOConfig, MergeConfig, RMConfig, SFTConfig
    from rlhf_data.inspection import InspectConfig
    from rlhf_infer.chat import ChatConfig
    from rlhf_infer.config import GenerateConfig, ScoreConfig
    from rlhf_infer.serve.config import ServeConfig

    training = (SFTConfig, RMConfig, DPOConfig, KTOConfig, KDConfig, MergeConfig)
    inference = (GenerateConfig, ScoreConfig, InferConfig, ServeConfig, ChatConfig, *RECIPES.values())
    for config in (*training, *inference, InspectConfig, QuickstartConfig):
        flags = [flag for name, field, _ in options(config) for flag in (name, *aliases_of(field))]
        assert len(flags) == len(set(flags))


def test_two_groups_that_share_a_flag_are_not_accepted_as_a_command():
    import typer

    from rlhf_cli.options import command
    from rlhf_data.config import Config

    class One(Config):
        """One."""

        size: int = 1

    class Other(Config):
        """Other."""

        size: int = 2

    class Both(Config):
        """Both."""

        one: One = One()
        other: Other = Other()

    def run(config: Both) -> None: ...

    with pytest.raises(ValueError, match="size"):
        command(typer.Typer(), "both", Both)(run)


def test_an_alias_that_is_another_options_flag_is_not_accepted_as_a_command():
    import typer

    from rlhf_cli.options import command
    from rlhf_data.config import Alias, Config

    class Clash(Config):
        """Clash."""

        size: Annotated[int, Alias("width")] = 1
        width: int = 2

    def run(config: Clash) -> None: ...

    with pytest.raises(ValueError, match="width"):
        command(typer.Typer(), "clash", Clash)(run)


def test_the_record_of_a_run_is_an_option_file_that_gives_the_same_run(sft, rlhf, tmp_path, metrics):
    from rlhf_cli.options import build, read_yaml
    from rlhf_core.config import SFTConfig

    first = rlhf(
        sft(
            "--adam_betas",
            "0.8",
            "0.9",
            "--target_modules",
            "q_proj",
            "v_proj",
            max_samples=16,
            lora_rank=4,
            input_template="{}\\n",
        )
    )
    assert first.code == 0, first.err
    record = tmp_path / "out/run/config.json"
    config = build(SFTConfig, read_yaml(record, SFTConfig))
    assert config.model_dump(mode="json") == json.loads(record.read_text())
    again = rlhf(["train", "sft", "--config", str(record), "--save_path", str(tmp_path / "again")])
    assert again.code == 0, again.err
    assert [row["loss"] for row in metrics(tmp_path / "again") if "loss" in row] == [
        row["loss"] for row in metrics(tmp_path / "out") if "loss" in row
    ]


def test_the_record_of_a_preference_run_is_an_option_file_that_gives_the_same_run(tiny, train, rlhf, tmp_path, metrics):
    from rlhf_cli.options import build, read_yaml
    from rlhf_core.config import DPOConfig

    given = {"flash_attn": True, "ipo": True, "nll_loss_coef": 0.1, "max_samples": 16, "ref_pretrain": tiny}
    first = rlhf(train("dpo", "--no_share_prefix", **given))
    assert first.code == 0, first.err
    record = tmp_path / "out/run/config.json"
    config = build(DPOConfig, read_yaml(record, DPOConfig))
    assert config.model_dump(mode="json") == json.loads(record.read_text())
    assert config.preference.ipo and config.preference.share_prefix is False
    again = rlhf(["train", "dpo", "--config", str(record), "--save_path", str(tmp_path / "again")])
    assert again.code == 0, again.err
    assert [row["loss"] for row in metrics(tmp_path / "again") if "loss" in row] == [
        row["loss"] for row in metrics(tmp_path / "out") if "loss" in row
    ]


KEY = "0123456789abcdef0123456789abcdef01234567"


def test_a_hidden_key_is_not_read_back_from_a_record_as_if_it_were_one(tmp_path):
    from rlhf_cli.options import build, read_yaml
    from rlhf_core.config import SFTConfig

    config = build(SFTConfig, {"pretrain": "m", "dataset": "d", "use_wandb": KEY})
    record = tmp_path / "config.json"
    record.write_text(json.dumps(config.model_dump(mode="json")))
    assert KEY not in record.read_text()
    again = build(SFTConfig, read_yaml(record, SFTConfig))
    assert again.logging.use_wandb is None
    assert again.model_copy(update={"logging": config.logging}) == config


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--use_wandb", KEY, "--bf16"], ["--use_wandb", "True", "--bf16"]),
        (["--bf16", f"--use_wandb={KEY}"], ["--bf16", "--use_wandb=True"]),
        (["--use-wandb", KEY], ["--use-wandb", "True"]),
        (["--use_wandb", "True", "--max_len", "3"], ["--use_wandb", "True", "--max_len", "3"]),
        (["--max_len", "3"], ["--max_len", "3"]),
    ],
    ids=" ".join,
)
def test_ranks_get_a_key_in_their_environment_and_not_on_their_command_line(given, passed, monkeypatch):
    from rlhf_cli.launch import hide_key

    monkeypatch.setenv("WANDB_API_KEY", "")
    assert hide_key(given) == passed
    assert os.environ["WANDB_API_KEY"] == (KEY if any(KEY in argument for argument in given) else "")


@pytest.mark.timeout(120)
def test_a_key_is_never_written_down(sft, rlhf, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    answer = rlhf(sft(use_wandb=KEY, max_samples=16))
    assert answer.code == 0, answer.err
    assert KEY not in answer.out + answer.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_dry_run_prints_the_plan_loads_no_weight_and_writes_nothing(sft, rlhf, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a dry run loaded weights")

    monkeypatch.setattr("rlhf_core.models.loader.load_model", refuse)
    before = sorted(tmp_path.rglob("*"))
    answer = rlhf(sft("--dry_run", max_epochs=3, save_steps=2, zero_stage=3, use_tensorboard=tmp_path / "board"))
    assert answer.code == 0, answer.err
    assert answer.err == ""
    for part in ("Plan", "25 samples", "1 samples held out", "3 epoch(s) x 4 steps = 12 optimizer steps", "M parameters", "ZeRO stage 3",
                 "memory", "weights", "optimizer", "checkpoint every 2 steps", "TensorBoard"):  # fmt: skip
        assert part in answer.out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", ["rm", "dpo", "kto", "kd"])
def test_a_dry_run_of_any_method_prints_its_plan_and_writes_nothing(method, train, rlhf, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a dry run loaded weights")

    monkeypatch.setattr("rlhf_core.models.loader.load_model", refuse)
    before = sorted(tmp_path.rglob("*"))
    answer = rlhf(train(method, "--dry_run", max_epochs=3, zero_stage=3))
    assert answer.code == 0, answer.err
    assert answer.err == ""
    items = "pairs" if method in ("rm", "dpo") else "samples"
    for part in (
        "Plan",
        f"25 {items}",
        f"1 {items} held out",
        "3 epoch(s) x 4 steps = 12 optimizer steps",
        "ZeRO stage 3",
    ):
        assert part in answer.out
    assert (", frozen " in answer.out) == (method != "rm")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_plans_for_all_ranks_without_starting_them(sft, rlhf):
    answer = rlhf(sft("--dry_run", num_procs=2, num_nodes=2, micro_train_batch_size=1))
    assert answer.code == 0, answer.err
    assert "8 samples = 4 rank(s) x 2 micro-batch(es)" in answer.out


def test_inspect_shows_what_training_would_see(tiny, data, rlhf):
    answer = rlhf(
        [
            "data",
            "inspect",
            "--pretrain",
            str(tiny),
            "--dataset",
            str(data),
            "--input_key",
            "question",
            "--output_key",
            "response",
        ]
    )
    assert answer.code == 0, answer.err
    assert "26 of 26 rows kept" in answer.out and "⟦" in answer.out


def test_the_module_and_the_script_are_the_same_program(program):
    script = Path(sys.executable).with_name("rlhf")
    assert script.is_file()
    assert (
        program(["--version"]).out
        == subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    )


def test_a_reader_that_has_had_enough_is_no_error():
    rows = "rlhf_cli.errors import reported\nwith reported():\n    for n in range(100000): print(n)"
    command = subprocess.Popen([sys.executable, "-c", f"from {rows}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None and command.stderr is not None
    assert command.stdout.readline() == b"0\n"
    command.stdout.close()
    assert (command.stderr.read(), command.wait(60)) == (b"", 141)
    command.stderr.close()


def test_another_broken_pipe_is_one(capsys):
    with pytest.raises(SystemExit) as ended, reported():
        raise BrokenPipeError("a server left")
    assert ended.value.code == 1 and "BrokenPipeError: a server left" in capsys.readouterr().err
