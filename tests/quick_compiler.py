"""A C++ compiler that is quicker with Inductor's kernels: it compiles their headers once for all tests, and optimises less.

Called as `python quick_compiler.py FOLDER COMPILER WORDS...`. What is compiled ahead is kept in the folder. Other programs are
compiled as they are. With the options that Inductor uses, no result depends on the level of optimisation.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

HEADERS = "#include <torch/csrc/inductor/cpp_prefix.h>\n"


def compiled_ahead(folder, compiler, flags):
    """A header whose compiled form is beside it, where the compiler looks for it."""
    header = folder / f"{hashlib.sha256(repr(flags).encode()).hexdigest()[:16]}.h"
    compiled = header.with_suffix(".h.gch")
    with header.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not compiled.exists():
            header.write_text(HEADERS)
            part = header.with_suffix(".part")
            subprocess.run([compiler, *flags, "-x", "c++-header", header, "-o", part], check=True)
            part.rename(compiled)
    return header


def flags_of(words):
    """Without what is compiled, where to, and what is linked."""
    words = [word for word in words if not word.endswith(".cpp") and not word.startswith(("-l", "-L"))]
    if "-o" in words:
        place = words.index("-o")
        del words[place : place + 2]
    return [word for word in words if word != "-shared"]


def main(folder, compiler, *words):
    sources = [Path(word) for word in words if word.endswith(".cpp")]
    if sources and all(HEADERS in source.read_text() for source in sources):
        words = (*words, "-O1")
        words = ("-include", compiled_ahead(Path(folder), compiler, flags_of(words)), *words)
    os.execv(compiler, [compiler, *words])  # noqa: S606  (the compiler is meant, and no shell)


if __name__ == "__main__":
    main(*sys.argv[1:])
