"""Runs `eagle3-remote serve` here for each case on stdin, and prints how it ended, as JSON.

A case: environment variables, and arguments. All in one process, since a start takes seconds.
"""

from __future__ import annotations

import json
import os
import sys
from unittest import mock

from typer.testing import CliRunner

from eagle3_client.cli import app

ended = []
for variables, arguments in json.load(sys.stdin):
    with mock.patch.dict(os.environ, variables):
        result = CliRunner().invoke(app, ["serve", *arguments])
    ended.append([result.exit_code, result.output])
print(json.dumps(ended))
