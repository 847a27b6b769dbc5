"""Fixtures that many tests share: tiny, made in memory, offline."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores; torch reads this once, when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from interpreters import make_newest, make_oldest  # noqa: E402

from nanollada.trainers.data.tokenizers import train_tokenizer  # noqa: E402

TEXTS = [
    "The cat sat on the mat. The dog sat on the log.\nThe bird sang in 2024, the fish did not.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))",
    "你好,世界。今天天气很好,我们去公园散步。你好吗?",
    "user\nWhat is it?\nassistant\nIt is a test 🎉, and the test is long.\tsystem\n",
] * 4


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE, 300 entries. Shared: copy it before changing it."""
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="session")
def char_tokenizer():
    """One token per character of `TEXTS`. Shared: copy it before changing it."""
    return train_tokenizer(TEXTS, kind="char")


@pytest.fixture(scope="session")
def plain_tokenizer(tokenizer):
    """300 tokens, without mask and pad; the fourth is an ordinary special token. Shared, as the others."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace("<|mask|>", "<|other|>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def oldest_python(tmp_path_factory) -> str:
    """Made by pip, from the package index: for slow tests."""
    return make_oldest(tmp_path_factory.mktemp("environments") / "oldest")


@pytest.fixture(scope="session")
def newest_python(tmp_path_factory) -> str:
    """Likewise, with the newest that pyproject.toml allows."""
    return make_newest(tmp_path_factory.mktemp("environments") / "newest")


ROOT = Path(__file__).parent.parent
ROOMS = ("configuration_nanollada", "modeling_nanollada", "trainers", "scripts", "hub_upload")


def pytest_addoption(parser):
    text = "folder of a finished run of scripts/quickstart.py, for the slow tests on its models; else they make one"
    parser.addoption("--quickstart", help=text)


@pytest.fixture(scope="session")
def quickstart(request, tmp_path_factory) -> Path:
    """A checkout with a whole quickstart behind it, in `runs/quickstart`; what it printed is in `log`. Slow."""
    folder = tmp_path_factory.mktemp("quickstart")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room)
    for file in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, folder)
    if finished := request.config.getoption("--quickstart"):
        shutil.copytree(finished, folder / "runs" / "quickstart")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "COLUMNS": "80"}
    with open(folder / "log", "w") as log:
        command = [sys.executable, "scripts/quickstart.py"]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    return folder


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory):
    """Prepared rows never come from, or stay in, the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture
def browser_page():
    """A tab of a headless Chromium with a fresh profile. Without one the test fails: it must not go unnoticed."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(f"this test needs one of {', '.join(BROWSERS)} on the PATH: apt-get install -y chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, headless=True, args=BROWSER_FLAGS)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@pytest.fixture
def chinese_face():
    """The face that draws Chinese here. Without one the test fails: it must not go unnoticed."""
    from nanollada.scripts.reporting.fonts import Fonts

    face = Fonts().face("你")
    if face is None:
        pytest.fail("this test needs a Chinese font: apt-get install -y fonts-wqy-microhei")
    return face
