"""Run as a program: what a snippet of a document prints when it asks for other things than it does, in one process.

    python answering.py SNIPPET QUESTIONS     # a file of Python, a JSON list; prints a JSON list of what was printed

Whatever stands behind `"content":` in the snippet gives way to the question. Models are loaded once.
"""

import contextlib
import functools
import io
import json
import re
import sys
from pathlib import Path


def main(snippet: str, questions: str) -> None:
    """Prints the answers."""
    import transformers

    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        kind.from_pretrained = functools.cache(kind.from_pretrained)
    transformers.pipeline = functools.cache(transformers.pipeline)
    source, printed = Path(snippet).read_text(encoding="utf-8"), []
    (question,) = re.findall(r"""(?<="content": )(?:"[^"]*"|'[^']*')""", source)
    for other in json.loads(questions):
        asking = source.replace(question, repr(other))
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(asking, snippet, "exec"), {"__name__": "__main__"})
        printed.append(output.getvalue())
    print(json.dumps(printed))


if __name__ == "__main__":
    main(*sys.argv[1:])
