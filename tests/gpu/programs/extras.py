"""Prints, for an extra of pyproject.toml, which of the named modules none of its packages provides, which of the named
libraries none of them contains, and which of them is not installed, or in another version. Prints nothing if all is
well.

    extras.py cuda13 cupy,cudnn,nvmath libcublasLt.so,libcudnn.so
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, files, packages_distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

extra, modules, libraries = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = {
    canonicalize_name(requirement.name): requirement
    for requirement in map(Requirement, project["optional-dependencies"][extra])
}
providers = packages_distributions()
for module in modules:
    if not wanted.keys() & {canonicalize_name(name) for name in providers.get(module, [])}:
        print(f"no package of {extra} provides {module}: {providers.get(module)}")
contained = []
for name, requirement in wanted.items():
    try:
        contained += [path.name for path in files(name) or []]
        if not requirement.specifier.contains(version(name)):
            print(f"{name} {version(name)} is installed, not {requirement}")
    except PackageNotFoundError:
        print(f"{requirement} is not installed")
for library in libraries:
    if not any(name.startswith(library) for name in contained):
        print(f"no package of {extra} contains {library}")
