"""A small sweep that any user can submit."""

import json
import shutil
import sys

from flip.runs import attempts
from flip.runs.rundir import RunDir
from tests.harness.common import wait_until


class UserCommandLine:
    """Submits the sweep as a user. Its ranks record the folder of their code and complete without training."""

    def __init__(self, users, data):
        self.users = users
        self.place = users.folder / "desk"
        shutil.copytree(data, self.place / "data")
        self.stub = self.place / "python"
        self.sweep = self.place / "demo.yaml"
        self.site = self.place / "site.yaml"
        self.stub.write_text(
            # the agent starts each rank in a new interpreter, which is this script again
            f"""#!/bin/sh
if [ "$2" = jobs.runtime.node_agent ]; then
    shift 2
    exec {sys.executable} -c 'import sys
from jobs.runtime import node_agent
sys.executable = "{self.stub}"
node_agent.NodeAgent.preload = lambda self: None
sys.exit(node_agent.main(sys.argv[1:]))' "$@"
fi
if [ "$2" != jobs.worker ]; then exec {sys.executable} "$@"; fi
pwd > "$HOME/ran"
echo '{{"samples": 32}}' > "$3/result.json"
"""
        )
        self.site.write_text(f"kind: local\npython: {self.stub}\n")
        self.sweep.write_text(
            f"""
set:
  model: {{size: tiny}}
  data: {{manifest: {self.place}/data, tokenizer: {self.place}/data/tokenizer.json, workers: 0, block: 1}}
  stages: [{{name: pretrain, samples: 32, batch: 16}}]
  compute: {{threads: 1}}
runs: {{half: {{stages.pretrain.mask: 0.5}}}}
"""
        )
        for path in (self.place, *self.place.rglob("*")):
            path.chmod(0o755)

    def submit(self, user, root, *arguments, **options):
        arguments = ("--sweep", self.sweep, "--cluster", self.site, "--yes", *arguments)
        return user.python("jobs/submit.py", *arguments, FLIP_RUNS=root, **options)

    def until_complete(self, user, root, sweep="demo"):
        """Wait until the run of the sweep is complete, and its supervisor has recorded that."""

        def over():
            done = user.python("jobs", "status", sweep, "--json", FLIP_RUNS=root)
            return done.returncode == 0 and json.loads(done.stdout)[0]["state"] == "complete"

        def recorded():
            with user.acts():
                runs = [RunDir(path.parent) for path in (root / sweep).glob("[!.]*/job.json")]
                return not any(attempts.unended(run) for run in runs)

        wait_until(over, f"the end of {root / sweep}")
        wait_until(recorded, f"the record of the end of {root / sweep}")
