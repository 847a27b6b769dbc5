"""transformers' own tests of its models, run on ours. They come from its source distribution at test time: none of
them is in this repository. `NANOLLADA_TRANSFORMERS_SDIST` names a local `transformers-<version>.tar.gz` instead."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers_suite.skips import MACHINE_SKIPS, MASKED_SKIPS, MODEL_SKIPS, OWN_SKIPS

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM

HERE = Path(__file__).parent / "transformers_suite"
SDIST = "NANOLLADA_TRANSFORMERS_SDIST"
SHAPES = {
    "Causal": ("Plain", "GroupedTiedBiased", "LlamaYarn"),
    "Masked": ("Plain", "GroupedTiedBiased", "LlamaYarn", "Blocks", "LabelShift"),
}
# What the tests import and the source distribution lacks: empty where `skips.py` lists what would use it.
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'dtype': 'float16', 'output_hidden_states': True}\n",
    "distributed_testing_utils.py": "def run_distributed(world_size):\n    raise NotImplementedError\n",
}


def source_distribution(folder: Path) -> Path:
    """The archive of the installed transformers. Fails where there is none: that must not go unnoticed."""
    name = f"transformers-{version('transformers')}.tar.gz"
    given = os.environ.get(SDIST)
    if given is not None:
        if Path(given).name != name or not Path(given).is_file():
            pytest.fail(f"`{SDIST}` must be a file {name}, of the installed transformers, got {given}")
        return Path(given)
    wanted = f"transformers=={version('transformers')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps", wanted]
    found = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if found.returncode or not (folder / name).is_file():
        pytest.fail(f"{name} could not be fetched (`{SDIST}` may name a local one): {found.stderr[-2000:]}")
    return folder / name


def unpack(archive: Path, folder: Path) -> Path:
    """A package `tests` of transformers' test modules, the stubs, and our suite."""
    package = folder / "tests"
    with tarfile.open(archive) as whole:
        for member in whole:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                member.name = f"tests/{parts[2]}"
                whole.extract(member, folder, filter="data")
    for name, text in STUBS.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    for file in HERE.glob("*.py"):
        shutil.copy(file, package)
    (folder / "pytest.ini").write_text("[pytest]\npython_files = suite.py\n")
    return folder


def read_report(path: Path) -> dict[str, dict[str, dict]]:
    """From a JUnit file to {class: {"passed": {test}, "failed": {test: message}, "skipped": {test: {message}}}}."""
    classes = defaultdict(lambda: {"passed": set(), "failed": {}, "skipped": defaultdict(set)})
    for case in ElementTree.parse(path).iter("testcase"):
        found, name = classes[case.get("classname").rpartition(".")[2]], case.get("name")
        for bad in (*case.iter("failure"), *case.iter("error")):
            found["failed"][name] = bad.get("message")
        for skip in case.iter("skipped"):
            found["skipped"][name].add(skip.get("message"))
        # A test with subtests has an entry for each of them that failed or was skipped, and one for itself.
        if not len(case):
            found["passed"].add(name)
    for found in classes.values():
        found["passed"] -= {*found["failed"], *found["skipped"]}
    return classes


def unexpected_skips(skipped: dict[str, set[str]], expected: dict[str, set[str]]) -> list[str]:
    """Tests that were skipped although, or with a message with which, they are not listed."""
    return [
        f"{test}: {message}"
        for test, messages in skipped.items()
        for message in messages
        if not any(re.match(pattern, message) and test in tests for pattern, tests in expected.items())
    ]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    return unpack(source_distribution(folder), folder)


@pytest.mark.slow
@pytest.mark.parametrize("model", SHAPES)
def test_transformers_own_tests(suite, model):
    """Each class passes at least 200 of them, with several shapes; none fails; what is skipped is listed."""
    report = suite / f"{model}.xml"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUN_TRAINING_TESTS": "1", "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the list of skips is a CPU's
    tests = [f"tests/suite.py::{model}{shape}" for shape in SHAPES[model]]
    command = [sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, f"--junitxml={report}", *tests], cwd=suite, env=environment, capture_output=True, text=True
    )
    assert report.is_file(), run.stdout[-4000:] + run.stderr[-4000:]
    classes = read_report(report)
    assert set(classes) == {f"{model}{shape}" for shape in SHAPES[model]}, run.stdout[-4000:]
    failed = {
        f"{name}::{test}": message for name, found in classes.items() for test, message in found["failed"].items()
    }
    assert not failed and run.returncode == 0, f"{failed}\n{run.stdout[-4000:]}"
    print(f"{model}: { {name: (len(found['passed']), len(found['skipped'])) for name, found in classes.items()} }")
    assert sum(len(found["passed"]) for found in classes.values()) >= 200
    of_model = {**MODEL_SKIPS, **(MASKED_SKIPS if model == "Masked" else {})}
    of_model |= {re.escape(reason): {test} for test, reason in OWN_SKIPS.items()}
    for name, found in classes.items():
        assert unexpected_skips(found["skipped"], {**MACHINE_SKIPS, **of_model}) == [], name
        listed = {test for tests in of_model.values() for test in tests}
        assert listed <= set(found["skipped"]), f"{name}: {listed - set(found['skipped'])} are not skipped any more"
        assert ("test_training_overfit" in found["passed"]) == (model == "Causal")


def test_a_report_is_read(tmp_path):
    """A failing subtest fails its test, and a skip that nobody listed is told."""
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.suite.A" name="test_good"/>'
        '<testcase classname="tests.suite.A" name="test_bad"><failure message="no"/></testcase>'
        '<testcase classname="tests.suite.A" name="test_bad"/>'
        '<testcase classname="tests.suite.A" name="test_part"><skipped message="one"/><skipped message="two"/>'
        "</testcase>"
        '<testcase classname="tests.suite.B" name="test_good"><error message="broken"/></testcase>'
        "</testsuite></testsuites>"
    )
    classes = read_report(report)
    assert classes["A"] == {
        "passed": {"test_good"},
        "failed": {"test_bad": "no"},
        "skipped": {"test_part": {"one", "two"}},
    }
    assert classes["B"]["failed"] == {"test_good": "broken"} and not classes["B"]["passed"]
    assert unexpected_skips(classes["A"]["skipped"], {"one": {"test_part"}, "two": {"test_other"}}) == [
        "test_part: two"
    ]


def test_without_the_source_distribution_the_test_fails(tmp_path, monkeypatch):
    missing = tmp_path / f"transformers-{version('transformers')}.tar.gz"
    other = tmp_path / "transformers-4.0.0.tar.gz"
    other.touch()
    for path in (missing, other):
        monkeypatch.setenv(SDIST, str(path))
        with pytest.raises(
            pytest.fail.Exception, match=f"`{SDIST}` must be a file transformers-.*, got .*{path.name}"
        ):
            source_distribution(tmp_path)
    monkeypatch.delenv(SDIST)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(pytest.fail.Exception, match="could not be fetched"):
        source_distribution(tmp_path / "empty")


def test_labels_that_were_shifted_before():
    """What `test_causal_lm_loss_honors_shift_labels` found: they replace the labels, and no weights go with them."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=32, **shape))
    labels = torch.randint(4, 32, (2, 6))
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(labels, labels=labels).loss
    assert torch.equal(model(labels, labels=labels, shift_labels=shifted).loss, expected)
    assert torch.equal(model(labels, labels=labels.flip(1), shift_labels=shifted).loss, expected)
    assert not torch.equal(model(labels, labels=labels.flip(1)).loss, expected)
    with pytest.raises(ValueError, match="`loss_weights` weigh unshifted labels: `shift_labels` must not be given"):
        model(labels, labels=labels, shift_labels=shifted, loss_weights=torch.ones(2, 6))
