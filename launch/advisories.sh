#!/usr/bin/env bash
# Looks up every installed package among the known advisories of PyPI. Exit code 1: there are
# some, or a package could not be looked up, which it names.
#
#   bash launch/advisories.sh        (needs the network; arguments go to pip-audit)
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
setup .
audit=.cache/advisories # A place of its own: its packages are not ours.
if [ ! -x $audit/bin/pip-audit ]; then
  python -m venv $audit
  $audit/bin/pip install --quiet --disable-pip-version-check "pip-audit>=2.10"
fi
installed=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
$audit/bin/pip-audit --strict --skip-editable --progress-spinner=off --path "$installed" "$@"
