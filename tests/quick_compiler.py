"""A C++ compiler that is quicker with what Inductor writes: it compiles the headers once for all tests, and optimises nothing.

Called as `python quick_compiler.py FOLDER COMPILER WORDS...`. What is compiled ahead is kept in the folder. Other programs are
compiled as they are. With the options that Inductor uses, no result depends on the level of optimisation.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

HEADERS = (
    "#include <torch/csrc/inductor/cpp_prefix.h>\n",  # of kernels
    "#include <torch/csrc/inductor/aoti_include/cpu.h>\n",  # of what calls them in an exported model
)
LEVEL = "-O0"


def compiled_ahead(folder, compiler, flags, headers):
    """A header whose compiled form is beside it, where the compiler looks for it."""
    header = folder / f"{hashlib.sha256(repr((flags, headers)).encode()).hexdigest()[:16]}.h"
    compiled = header.with_suffix(".h.gch")
    with header.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not compiled.exists():
            header.write_text(headers)
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
    sources = [Path(word).read_text() for word in words if word.endswith(".cpp")]
    headers = next((one for one in HEADERS if sources and all(one in source for source in sources)), None)
    if headers is not None:
        words = (*words, LEVEL)
        words = ("-include", compiled_ahead(Path(folder), compiler, flags_of(words), headers), *words)
    os.execv(compiler, [compiler, *words])  # noqa: S606  (the compiler is meant, and no shell)


if __name__ == "__main__":
    main(*sys.argv[1:])
