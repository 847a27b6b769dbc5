"""Checks that an exported folder works for somebody who has transformers and no nanollada.

python hub_upload/verify.py FOLDER, or in a download: python verify.py

The card's numbers are compared with evaluation.json. Then the folder is loaded in a fresh process, isolated, offline,
with nanollada blocked. There `generate` is compared with a recomputation (recompute.py) and that with the folder's
golden tokens; the logits are compared with those of the local classes. Every exported folder carries this very file,
so above `main` it imports the standard library only; a check that needs what is not there is named as not made. The
folder's own code and its card's snippets are executed: verify what you would also load with trust_remote_code=True.
"""

import argparse
import contextlib
import difflib
import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ADAPTER = "adapter_config.json"
OPTIONS = ("--python", "--base_model")
FAULTS = 5  # of a card that are named
TIMEOUT = 1800  # seconds
BLOCKED = ("nanollada", "configuration_nanollada", "modeling_nanollada", "hub_upload", "trainers")
AUTO_CLASSES = {
    "NanoLLaDAForCausalLM": ("AutoModel", "AutoModelForCausalLM"),
    "NanoLLaDAForMaskedLM": ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"),
}
PRINTED = re.compile(r"\n+It printed:\n+```text\n(.*?)\n```$", re.MULTILINE | re.DOTALL)  # behind a snippet
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
REPO_ID = re.compile(r"^repo_id = .*$", re.MULTILINE)  # the one line of the card that differs between folder and Hub


class VerificationError(ValueError):
    """The folder is not what a Hub repository must be; says which check failed and why."""


def verify(
    folder: str | os.PathLike,
    python: str | os.PathLike | None = None,
    say=lambda line: None,
    base_model: str | os.PathLike | None = None,
) -> dict:
    """
    Loads an exported folder in a clean process, recomputes what it generates, and compares it with the local classes.

    Args:
        folder (`str` or `os.PathLike`): As `export` makes it.
        python (`str` or `os.PathLike`, *optional*): The interpreter of the clean process, for instance one with
            another transformers. Defaults to the running one.
        say (`Callable[[str], None]`, *optional*): Gets a line for each check that was passed or can't be made here.
        base_model (`str` or `os.PathLike`, *optional*): Folder of an adapter's model. Default: as it was downloaded.

    Returns:
        `dict`: `ok` (`True`), `folder`, `class`, `auto_classes`, `parameters`, `max_logit_difference` (`None` if
            nanollada is not installed here, so that there was nothing to compare with); `generated_tokens` and
            `golden_tokens`, how many were compared, of how many (`None` without golden tokens); of the card `snippets`
            and `generate_calls`; `python`, `torch`, `transformers`, `huggingface_hub` (versions in the clean process);
            `not_checked`, the lines about checks that could not be made; `seconds`.

    Raises:
        `VerificationError`: naming the check that failed.
    """
    started, not_checked = time.perf_counter(), []
    folder = Path(folder).resolve()

    def tell(name: str, missing: str | None, done: str = "ok"):
        line = f"{name}: not checked: {missing}" if missing else f"{name}: {done}"
        not_checked.extend([line] if missing else [])
        say(line)

    check_files(folder)
    adapter = (folder / ADAPTER).is_file()
    _require(adapter or base_model is None, f"`base_model` is for an adapter, got {base_model} for {folder.name}")
    with _verifying():
        base = load_neighbour("recompute").base_folder(folder, base_model) if adapter else None
    tell("files", None)
    tell("results", check_results(folder), "the card's numbers are those of evaluation.json")
    with tempfile.TemporaryDirectory(prefix="nanollada-verify-") as scratch:
        if base is not None:
            load_neighbour("recompute").put_into_cache(folder, base, Path(scratch) / "home")
        clean = _start_clean_process(folder, Path(scratch), python or sys.executable)
        try:
            reference = _reference_logits(folder, base)  # while the other process imports
            output, _ = clean.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise VerificationError(f"`folder` must load and generate within {TIMEOUT} s, got no end") from None
        finally:
            clean.kill()
            clean.wait()
        report = _read_report(Path(scratch), clean.returncode, output, tell)
        difference = report["max_logit_difference"] = _compare(Path(scratch) / "logits.pt", reference)
        missing = "nanollada is not installed here" if difference is None else None
        tell("logits", missing, "those of the local classes")
    seconds = round(time.perf_counter() - started, 1)
    return {"ok": True, "folder": folder.name, **report, "not_checked": not_checked, "seconds": seconds}


def check_files(folder: Path) -> dict:
    """
    What can be seen without running anything: the files, a complete `auto_map` that points to them, and whose weights
    the golden tokens are.

    Returns:
        `dict`: config.json; of an adapter adapter_config.json.

    Raises:
        `VerificationError`: naming what is missing or wrong.
    """
    adapter = (folder / ADAPTER).is_file()
    needed = ("README.md", ADAPTER if adapter else "config.json", "generation_config.json", "tokenizer_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    _require(not missing, f"`folder` must hold {', '.join(needed)}, got none of {missing} in {folder.name}")
    _require(any(folder.glob("*.safetensors")), f"`folder` must hold safetensors weights, got none in {folder.name}")
    if adapter:
        with _verifying():
            load_neighbour("recompute").check_adapter(folder)
        read_golden(folder)
        return load_neighbour("recompute").read_adapter(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or [None])[0]
    _require(
        architecture in AUTO_CLASSES,
        f"`architectures` of config.json must be one of {', '.join(AUTO_CLASSES)}, got {architecture}",
    )
    expected = {"AutoConfig": "configuration_nanollada.NanoLLaDAConfig"}
    expected |= dict.fromkeys(AUTO_CLASSES[architecture], f"modeling_nanollada.{architecture}")
    given = config.get("auto_map")
    _require(given == expected, f"`auto_map` of config.json must be {expected}, got {given}")
    for module in sorted({target.split(".")[0] for target in expected.values()}):
        path = folder / f"{module}.py"
        _require(path.is_file(), f"`auto_map` of config.json names {module}, got no {path.name} in {folder.name}")
    source = (folder / "configuration_nanollada.py").read_text(encoding="utf-8")
    _require(
        "model_type" in source,
        "configuration_nanollada.py must be the configuration itself, got the bridge of the source tree (was "
        "modeling_nanollada/ copied by hand? export with save_pretrained)",
    )
    read_golden(folder)
    return config


def read_golden(folder: Path) -> dict | None:
    """
    See `recompute.read_golden`.

    Raises:
        `VerificationError`: for a file that can't be read, that holds no runs, or that is of other weights.
    """
    with _verifying():
        return load_neighbour("recompute").read_golden(folder)


def check_results(folder: Path) -> str | None:
    """
    Whether every number of the card's `model-index` and evaluation section stands in evaluation.json beside it, which
    must be of these weights and this config. See [`~hub_upload.card_check.card_faults`].

    Returns:
        `str` or `None`: why it could not be checked: card_check.py is not part of a download.

    Raises:
        `VerificationError`: naming what stands in the card and what in the file.
    """
    try:
        from nanollada.hub_upload.card_check import card_faults
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "nanollada":
            raise
        try:
            from card_check import card_faults  # this file runs by its path, without nanollada: its neighbour
        except ModuleNotFoundError as gone:
            if gone.name != "card_check":
                raise
            return "the card's numbers need nanollada, or its card_check.py beside verify.py"
    faults = card_faults(folder)
    more = f"; and {len(faults) - FAULTS} more" if len(faults) > FAULTS else ""
    _require(not faults, f"results: {'; '.join(faults[:FAULTS])}{more}")


def read_snippets(card: str, repo_id: str) -> list[str]:
    """The card's python blocks, with `repo_id` set."""
    return [REPO_ID.sub(lambda _: f"repo_id = {repo_id!r}", snippet) for snippet in SNIPPET.findall(card)]


def read_printed(card: str) -> list[str | None]:
    """What the card says that each of its python blocks prints; `None` where it says nothing."""
    return [match and match[1] for match in (PRINTED.match(card, block.end()) for block in SNIPPET.finditer(card))]


@contextlib.contextmanager
def _verifying():
    """A neighbour's `ValueError` is a check that failed."""
    try:
        yield
    except ValueError as error:
        raise VerificationError(str(error)) from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise VerificationError(message)


def clean_environment(scratch: Path) -> dict[str, str]:
    """This process's environment, offline, without credentials, caches and PYTHON* variables; caches in `scratch`."""
    dropped = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return environment | {
        "HF_HOME": str(scratch / "home"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _start_clean_process(folder: Path, scratch: Path, python: str | os.PathLike) -> subprocess.Popen:
    (scratch / "cwd").mkdir()
    command = [python, "-I", "-B", "-X", "utf8", Path(__file__).resolve(), folder, "--clean", scratch]
    return subprocess.Popen(
        command,
        cwd=scratch / "cwd",
        env=clean_environment(scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )


def _reference_logits(folder: Path, base: Path | None):
    """Logits of the local classes, or `None` without nanollada."""
    try:
        import nanollada.modeling_nanollada  # noqa: F401  registers the classes
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "nanollada":
            return None
        raise
    import torch
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained if base is None else load_neighbour("recompute").load
    try:
        model = load(folder, **({} if base is None else {"base": base}), dtype=torch.float32)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise VerificationError(f"`folder` must load with the local classes, got {error}") from error
    return load_neighbour("recompute").probe(model.eval())


def _read_report(scratch: Path, code: int, output: str, tell=lambda *line: None) -> dict:
    path = scratch / "report.json"
    tail = "\n".join(output.strip().splitlines()[-15:])
    _require(path.is_file(), f"the clean process must end with a report, got exit status {code} and:\n{tail}")
    report = json.loads(path.read_text(encoding="utf-8"))
    for line in report.pop("lines"):
        tell(*line)
    if "error" in report:
        raise VerificationError(f"{report['check']}: {report['error']}\n{tail}")
    return report


def _compare(path: Path, reference) -> float | None:
    """Largest difference of logits, see `recompute.compare_logits`."""
    if reference is None:
        return None
    import torch

    with _verifying():
        return load_neighbour("recompute").compare_logits(torch.load(path, weights_only=True), reference)


# ------------------------------------------------------------------------------------------------ the clean process


class _Blocker:
    """First in `sys.meta_path`: nanollada cannot be imported, however it is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked: a Hub folder must work without it", name=name)
        return None


class _CleanProcess:
    """The checks, in order; what they report goes to `report`."""

    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.scratch, self.report, self.details = folder, scratch, {}, {}
        path = folder / ADAPTER
        self.adapter = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def run(self) -> dict:
        lines, checks = [], (self.card, self.versions, self.config, self.tokenizer, self.models)
        for check in (*checks, self.generation, self.golden, self.snippets, self.isolation):
            try:
                missing = check()
            except Exception as error:  # whatever it is, the parent reports it under the check's name
                traceback.print_exc()
                return {"lines": lines, "check": check.__name__, "error": f"{type(error).__name__}: {error}"}
            lines.append((check.__name__, missing, self.details.get(check.__name__, "ok")))
        return {"lines": lines, **self.report}

    def card(self):
        from huggingface_hub import ModelCard

        text = (self.folder / "README.md").read_text(encoding="utf-8")
        gap = "[More Information Needed]"
        _require(gap not in text, f"README.md must be complete, got {gap!r} in it")
        data = ModelCard(text).data  # raises on a broken model-index
        library = [("library_name", "peft" if self.adapter else "transformers"), ("pipeline_tag", "text-generation")]
        name = self.adapter and self.adapter["base_model_name_or_path"]
        base = [("base_model", name), ("base_model_relation", "adapter")] if name else []
        for name, value in (*library, *base):
            got = getattr(data, name, None)
            _require(got == value, f"`{name}` of README.md must be {value!r}, got {got!r}")
        _require("custom_code" in (data.tags or []), f"`tags` of README.md must hold 'custom_code', got {data.tags}")

    def versions(self):
        import platform
        from importlib.metadata import version

        names = ("torch", "transformers", "huggingface_hub", *(["peft"] if self.adapter else []))
        numbers = {"python": platform.python_version(), **{name: version(name) for name in names}}
        self.report |= numbers
        self.details["versions"] = ", ".join(f"{name} {number}" for name, number in numbers.items())

    def config(self):
        from transformers import AutoConfig

        place, revision = self.folder, None
        if self.adapter is not None:
            place, revision = self.adapter["base_model_name_or_path"], self.adapter.get("revision")
        self.settings = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=True)
        module = type(self.settings).__module__
        _require(module.startswith("transformers_modules."), f"the config must come with its code, got {module}")

    def tokenizer(self):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=True)
        with _verifying():
            load_neighbour("recompute").check_tokenizer(self.settings, tokenizer)

    def models(self):
        import torch
        import transformers

        architecture, options = self.settings.architectures[0], {"trust_remote_code": True, "dtype": torch.float32}
        if self.adapter is None:
            loaded = {name: getattr(transformers, name).from_pretrained for name in AUTO_CLASSES[architecture]}
            loaded = {name: load(self.folder, **options, output_loading_info=True) for name, load in loaded.items()}
        else:
            loaded = load_neighbour("recompute").load_in_each_way(self.folder, **options)
            loaded = {name: (model, {}) for name, model in loaded.items()}
        names, logits = list(loaded), None
        for name, (model, loading) in loaded.items():
            kind = type(model if self.adapter is None else model.get_base_model()).__name__
            _require(kind == architecture, f"{name} must give {architecture}, got {kind}")
            faults = {key: sorted(map(str, value)) for key, value in loading.items() if value}
            _require(not faults, f"{name} must find exactly its tensors, got {faults}")
            first, logits = logits, load_neighbour("recompute").probe(model.eval())
            _require(first is None or torch.equal(first, logits), f"{name} must give the logits of {names[0]}")
        torch.save(logits, self.scratch / "logits.pt")
        self.model = model
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.report |= {"class": architecture, "auto_classes": names, "parameters": parameters}

    def generation(self):
        """`generate` gives what is recomputed."""
        versions = f"transformers {self.report['transformers']}"
        self.recomputation = load_neighbour("recompute").Recomputation(self.model, versions)
        return self._count("generation", "generated_tokens", self.recomputation.check_generate())

    def golden(self):
        """What is recomputed here is what was recomputed where the folder was made."""
        golden = read_golden(self.folder)
        if golden is None:
            self.report["golden_tokens"] = None
            return "no golden.json in the folder (of an older version: export again)"
        return self._count("golden", "golden_tokens", self.recomputation.check_golden(golden))

    def _count(self, check: str, name: str, counts: list[int]) -> str | None:
        self.report[name] = counts
        rest = "" if counts[0] == counts[1] else ", the others come after ties"
        self.details[check] = f"{counts[0]} of {counts[1]} tokens compared and equal{rest}"
        return None if counts[0] else "every first choice is a tie, so that no token could be compared"

    def snippets(self):
        """Runs the card's python blocks as one program; looks at all that they generate, and at what they print."""
        from transformers import GenerationMixin

        card = (self.folder / "README.md").read_text(encoding="utf-8")
        snippets, said = read_snippets(card, str(self.folder)), read_printed(card)
        _require(any(map(REPO_ID.search, snippets)), "a python block of README.md must set `repo_id`")
        generated, generate = [], GenerationMixin.generate

        def recorded(model, *args, **kwargs):
            generated.append(generate(model, *args, **kwargs))
            return generated[-1]

        GenerationMixin.generate = recorded
        printed = _run_blocks(snippets)
        _require(bool(generated), "a python block of README.md must call `generate`")
        hidden = load_neighbour("recompute").never_left(self.settings)
        for ids in (getattr(output, "sequences", output) for output in generated):
            left = [token for token in ids.flatten().tolist() if token in hidden]
            _require(not left, f"`generate` must leave no mask or edit token, got {len(left)} in {ids.tolist()}")
        self.report |= {"snippets": len(snippets), "generate_calls": len(generated)}
        return self._compare_printed(said, printed, lambda: _run_blocks(snippets))

    def _compare_printed(self, said: list[str | None], printed: list[str], run) -> str | None:
        """Whether the blocks print what the card says, or why that can't be compared."""
        odd = [pair for pair in zip(said, printed, strict=True) if pair[0] not in (None, pair[1])]
        if odd and (run() != printed or "float32" not in str(self.settings.dtype or "float32")):
            return "what the python blocks print differs from the card, as draws and rounding in half precision do"
        _require(not odd, "README.md says that a python block printed {!r}, got {!r}".format(*next(iter(odd), "  ")))

    def isolation(self):
        loaded = sorted(name for name in sys.modules if name.split(".")[0] in BLOCKED)
        _require(not loaded, f"the folder must work without nanollada, got it imported: {loaded}")


def _run_blocks(blocks: list[str]) -> list[str]:
    """What each of a card's python blocks prints, run as one program."""
    namespace, outputs = {"__name__": "__main__"}, [io.StringIO() for _ in blocks]
    for number, (code, output) in enumerate(zip(blocks, outputs, strict=True), start=1):
        with contextlib.redirect_stdout(output):
            exec(compile(code, f"README.md, python block {number}", "exec"), namespace)
    return [output.getvalue().rstrip("\n") for output in outputs]


def load_neighbour(name: str):
    """A module beside this file, whether this one is part of the package, of a download, or the clean process."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def block_nanollada() -> None:
    """For this process: no import of nanollada works any more."""
    sys.meta_path.insert(0, _Blocker)


def _mistake(message: str) -> int:
    """Says what is wrong with the command line, as the other programs do; the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """
    Verifies the folder; prints a line per check, and a JSON report on one. Exit status 1 if a check fails, 2 for a
    command line that is wrong.
    """
    description = "Check an exported folder in a clean process without nanollada."
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    here = Path(__file__).resolve().parent
    download = any((here / name).is_file() for name in ("config.json", ADAPTER))
    own = {"nargs": "?", "default": here} if download else {}
    parser.add_argument("folder", type=Path, help="Folder made by export.py (default: that of this file).", **own)
    parser.add_argument("--python", help="Interpreter of the clean process (default: this one).")
    parser.add_argument("--base_model", help="Of an adapter: its model's folder (default: the downloaded one).")
    parser.add_argument("--clean", type=Path, help=argparse.SUPPRESS)  # how the clean process is told that it is one
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = "".join(f": did you mean `{name}`?" for name in difflib.get_close_matches(unknown[0], OPTIONS))
        return _mistake(f"unknown option `{unknown[0]}`{near}")
    if not args.folder.is_dir():
        return _mistake(f"`folder` must be a folder made by export.py, got {args.folder}, which is not there")
    if args.clean is not None:
        block_nanollada()
        report = _CleanProcess(args.folder, args.clean).run()
        (args.clean / "report.json").write_text(json.dumps(report), encoding="utf-8")
        return 0
    try:
        say = functools.partial(print, file=sys.stderr, flush=True)
        print(json.dumps(verify(args.folder, args.python, say, args.base_model)))
    except VerificationError as error:
        print(f"FAILED: {str(error).splitlines()[0]}", file=sys.stderr)
        print(json.dumps({"ok": False, "folder": args.folder.resolve().name, "error": str(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
