#!/bin/sh
# Prints constraints.txt: what is installed in .venv, name by name, without this project itself.
set -eu

echo "# What is tested, exactly. Renewed with \`make constraints\`."
.venv/bin/python -m pip --disable-pip-version-check freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==[^ ]+$' | LC_ALL=C sort -f
