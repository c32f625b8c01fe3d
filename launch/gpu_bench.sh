#!/usr/bin/env bash
# Measures on a GPU machine that reaches no package index. It is `run.sh` in a pack of tools.bench.pack, beside the code, the
# wheels and needs.txt; what the machine lacks or has too old is installed into env/, and nothing else is touched.
#     ./run.sh [ARGUMENTS OF tools.bench.gpu]          PYTHON=python3.12 ./run.sh --size tiny
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
if [[ ! -x env/bin/python ]]; then
    "$python" -m venv --without-pip --system-site-packages env
    # A Python that is an environment itself shares its packages too.
    "$python" - env <<'END'
import pathlib, sys
inside = next(pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"))
shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
(inside / "shared.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in shared))
END
fi
PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels "$python" -m pip --python env/bin/python install --quiet \
    --disable-pip-version-check --no-deps --requirement needs.txt
exec env/bin/python -m tools.bench.gpu "$@"
