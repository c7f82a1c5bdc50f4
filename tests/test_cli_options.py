"""MergeKit's options in help and completion, and suggestions for what is misspelt."""

import re
import sys

import pytest
from click.testing import CliRunner
from conftest import command, run

from mergekit_metagpt.cli import main
from mergekit_metagpt.cli._mergekit_options import SHOWN
from mergekit_metagpt.mergekit_private import merge_options

TAKE_THEM = ["survey", "coefficients", "compare", "check", "diagnose", "resolve", "merge"]


def test_the_list_is_that_of_mergekit():
    _, real = merge_options(lambda **_: None)

    def described(option):
        flags = (*option.opts, *option.secondary_opts)
        return sorted(flags), option.help, option.is_flag, option.count

    assert list(map(described, SHOWN)) == list(map(described, real))


@pytest.mark.parametrize("name", TAKE_THEM)
def test_help_shows_them_in_a_group_of_their_own(name):
    own, theirs = CliRunner().invoke(main, [name, "--help"]).stdout.split("MergeKit's options:")
    assert "--verbose" in own
    assert "--lora-merge-cache" in theirs
    assert "--lora-merge-cache" not in own


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("me", "merge"),
        ("coefficients --gran", "--granularity"),
        ("coefficients --dev", "--device"),
        ("merge --no-copy", "--no-copy-tokenizer"),
        ("merge metagpt.yml out --random", "--random-seed"),
    ],
)
def test_a_shell_completes_commands_and_all_options(words, completed):
    words = f"mergekit-metagpt {words}"
    done = run(
        command("mergekit-metagpt"),
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - 1),
        _MERGEKIT_METAGPT_COMPLETE="bash_complete",
    )
    assert done.stdout.splitlines() == [f"plain,{completed}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merg"], "No such command merg Did you mean merge"),
        (["coeficients", "x"], "No such command coeficients Did you mean coefficients"),
        (["xyz"], "No such command xyz"),
        (["check", "--devise", "x"], "No such option --devise Did you mean --device"),
        (["compare", "--exponents", "1"], "Did you mean --exponent"),
        (["check", "--nonsense"], "No such option --nonsense"),
    ],
)
def test_what_is_misspelt_gets_a_suggestion(words, said):
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert said in re.sub("[:.?']", "", done.stderr)  # click's versions differ in these


def test_a_misspelt_option_is_refused_before_torch_is_imported():
    program = (
        "import sys\nfrom mergekit_metagpt.cli import main\n"
        "try:\n    main(['check', 'x.yml', '--devise', 'cpu'])\n"
        "except SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'mergekit'} & set(sys.modules)))\n"
    )
    assert run(sys.executable, "-c", program).stdout == "2 []\n"
