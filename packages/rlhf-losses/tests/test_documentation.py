"""The README and the docstrings say what the package does, and are right."""

import contextlib
import inspect
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_losses

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
HELPERS = {
    "entropy",
    "linear_divergence",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "masked_whiten",
    "segment_ids",
    "segment_mean",
    "segment_sum",
    "token_logps",
}  # definitions, not anybody's method

every_function = pytest.mark.parametrize("name", rlhf_losses.__all__)


@every_function
def test_a_public_function_says_what_it_takes_returns_and_who_proposed_it(name):
    function = getattr(rlhf_losses, name)
    doc = inspect.getdoc(function)
    summary, *sections = re.split(r"\n\n(?=Args:|Returns:|Source:)", doc)
    assert len(summary.splitlines()[0]) < 120
    titles = [section.split(":")[0] for section in sections]
    assert titles in (["Args", "Returns", "Source"], ["Args", "Returns"])
    assert titles[-1] == "Source" or name in HELPERS
    documented = re.findall(r"^    (\w+): ", sections[0], flags=re.MULTILINE)
    assert documented == list(inspect.signature(function).parameters)


@every_function
def test_a_public_function_is_in_the_table_and_in_an_example(name):
    assert re.search(rf"^\| `{name}` \|", README, flags=re.MULTILINE)
    assert any(re.search(rf"\b{name}\(", block) or f"({name}, " in block for block in BLOCKS) or name in (
        "reverse_kl",
        "jsd",
        "skew_kl",
    )


def test_the_table_lists_nothing_else():
    assert sorted(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)) == sorted(rlhf_losses.__all__)


def test_the_readme_examples_run_and_print_what_their_comments_say():
    namespace, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in BLOCKS:
            exec(block, namespace)
    promised = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(BLOCKS), flags=re.MULTILINE)
    assert printed.getvalue().splitlines() == promised


def test_importing_the_package_imports_torch_and_no_other_library_of_ours():
    """Torch itself imports numpy if it is there, so compare with what torch alone brings."""
    code = "import sys, {}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    torch_only, ours = (
        subprocess.run([sys.executable, "-c", code.format(m)], capture_output=True, text=True, check=True)
        for m in ("torch, torch.utils._pytree", "rlhf_losses")
    )
    new = set(ours.stdout.split()) - set(torch_only.stdout.split()) - set(sys.stdlib_module_names)
    assert new == {"rlhf_losses"}


def test_files_and_functions_stay_short():
    for path in Path(rlhf_losses.__file__).parent.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 400, path
