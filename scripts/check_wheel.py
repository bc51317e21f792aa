"""Checks what a wheel of dlops holds: tags, files, metadata, no path of the build machine.

python scripts/check_wheel.py dist/dlops-*.whl
"""

import re
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

ALLOWED = re.compile(
    r"dlops/(ops/)?\w+\.py|dlops/py\.typed|dlops/_C\.[\w-]+\.so"
    r"|dlops-[\w.]+\.dist-info/((licenses/)?LICENSE|METADATA|WHEEL|RECORD|top_level\.txt)"
)
# Where people and machines build: a path below one of these says where this wheel was made.
BUILD_PATH = re.compile(
    rb"/(?:home|root|tmp|opt|build|github|__w|Users|workspace)/[\w.+-]+/[\w./+-]*"
)
# torch's own, in its headers' messages; and documentation.
HARMLESS = re.compile(rb"^/home/user/|^/tmp/example/")


def problems(wheel: Path) -> Iterator[str]:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    tag = f"{python}-{python}-{platform}"
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if not wheel.name.endswith(f"-{tag}.whl"):
        yield f"{wheel.name}: the name does not end with the tag {tag}"
    yield from (f"{name} does not belong in it" for name in files if not ALLOWED.fullmatch(name))
    for wanted in ("LICENSE", "METADATA", "WHEEL", "dlops/py.typed", "dlops/_build_config.py"):
        if not any(name.endswith(wanted) for name in files):
            yield f"there is no {wanted}"
    if sum(name.endswith(".so") for name in files) != 1:
        yield "it must hold one compiled module"
    texts = {name.rpartition("/")[2]: text.decode(errors="replace") for name, text in files.items()}
    about = texts.get("WHEEL", "")
    if f"Tag: {tag}\n" not in about or "Root-Is-Purelib: false" not in about:
        yield f"WHEEL does not say Tag: {tag}, Root-Is-Purelib: false"
    for wanted in (
        r"Requires-Python: >=",
        r"Requires-Dist: torch ?<[^;]+>=",
        r"Requires-Dist: numpy ?<[^;]+>=",
        r"License(-Expression)?: BSD-3-Clause",
    ):
        if not re.search(f"^{wanted}", texts.get("METADATA", ""), re.MULTILINE):
            yield f"METADATA has no line {wanted}"
    for name, content in files.items():
        for path in BUILD_PATH.findall(content):
            if not HARMLESS.match(path):
                yield f"{name} names {path.decode()}"


if __name__ == "__main__":
    found = [f"{wheel}: {problem}" for wheel in sys.argv[1:] for problem in problems(Path(wheel))]
    print("\n".join(found) or f"{len(sys.argv) - 1} wheel as it should be")
    sys.exit(1 if found or len(sys.argv) < 2 else 0)
