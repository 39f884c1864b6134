"""Plays the scenarios of tests/slurm unchanged on the simulated Slurm (tests/fakeslurm)."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

from flip.runs.rundir import read_json
from tests.fakeslurm.agents import AgentRanks
from tests.fakeslurm.clock import Clock
from tests.fakeslurm.commands import Commands
from tests.fakeslurm.controller import Controller
from tests.fakeslurm.host import Life
from tests.fakeslurm.scripted import Scripted
from tests.fakeslurm.seams import in_place
from tests.fakeslurm.site import Site
from tests.harness import slurm_scene
from tests.harness.slurm_scene import READ, SlurmScene, fields_of, masked
from tests.slurm.scenarios import SCENARIOS

POLL = 0.05


class SimulatedScene(SlurmScene):
    """A scene on the simulated Slurm, with the observations and records of ``SlurmScene``."""

    def __init__(self, clock, controller, commands, folder, name):
        sandbox = SimpleNamespace(call=commands.perform, lose=controller.lose, bring_back=controller.bring_back)
        super().__init__(sandbox, "", folder, name)
        self.clock = clock
        self.controller = controller
        self.commands = commands

    def watch(self):
        self.job_name = read_json(self.runs[0].path / "job.json")["name"]

    def unwatch(self):
        pass

    def until(self, condition, event):
        limit = self.clock.now + self.patience
        while not condition():
            assert self.clock.now < limit, f"{self.name}: timeout while waiting for {event}\n{self.story()}"
            self.clock.run(self.clock.now + POLL)
            attempts = [run.newest_attempt() for run in self.runs]
            for job in self._jobs():
                self._note(job.index or 0, job.key, "COMPLETING" if job.completing else job.state, attempts)

    def _jobs(self):
        return [job for job in self.controller.jobs.values() if job.name == self.job_name]

    def preempt(self, index=0, seconds=3):
        nodes = tuple(self.nodes(index))
        self.controller.submit(name="high", nodes_wanted=len(nodes), limit=60.0, seconds=seconds, nodelist=nodes)

    def kill(self, rank, index=0, n=1):
        (life,) = [job.life for job in self._jobs() if (job.index or 0) == index]
        life.body.kill_ranks({life.nodes[rank].name})

    def kill_agent(self, rank, n=1):
        self._jobs()[0].life.body.agents[rank].kill()

    def kill_task(self, rank):
        self._jobs()[0].life.body.agents[rank].kill_task()

    def kill_shell(self):
        self._jobs()[0].life.kill_owner()

    def kill_batch_step(self, spared=""):
        self._jobs()[0].life.kill_batch_step()

    def _calls(self, run, n, by):
        calls = []
        for call in self.commands.noted:
            place = call["by"]
            actor = {"guard": "owner"}.get(place.by, place.by) if place else ""
            matches = actor == by and place.life.path == run.path and call["attempt"] == str(n)
            if matches and call["words"][0] != "sbatch":  # not recorded by a shim
                read = {}
                if call["words"][1:3] == ["show", "job"]:
                    fields = fields_of(call["out"])
                    read["read"] = {
                        **{key: fields.get(key) for key in READ},
                        "SLURM_RESTART_COUNT": place.life.restarts,
                    }
                calls.append({**call, "words": masked(call["words"]), **read})
        return calls


@contextlib.contextmanager
def staged(name, folder, storage=None, **settings):
    """Provide a scene on a site with these settings. ``storage``: see ``host.Life``."""
    clock = Clock()

    def life(*arguments):
        return Life(*arguments, body=Scripted, storage=storage, agent_ranks=AgentRanks)

    controller = Controller(clock, Site(requeue_delay=6.0, **settings), ["n1", "n2", "n3", "n4"], life)
    commands = Commands(clock, controller)
    with in_place(clock, commands), mock.patch.object(slurm_scene, "time", clock.module):
        yield SimulatedScene(clock, controller, commands, folder, name)


def play(name, folder):
    """Return the record of a scenario, as ``recording.perform`` writes it for a real Slurm."""
    scenario = SCENARIOS[name]
    options = SCENARIOS[name].options
    settings = {"kill_wait": options["kill_wait"], "user_signal": options["user_signal"], "mode": scenario.mode}
    settings |= {"grace": scenario.grace, "node_timeout": options.get("node_timeout", 10)}
    settings |= {"requeue": not name.startswith("requeue_disabled")}
    settings |= {"refuses_followers": name == "requeue_disabled_refused"}
    with staged(name, folder, **settings) as scene:
        scenario.act(scene)
        scene.over()
        disturbed = 1 if name.startswith("last_element") else 0
        record = scene.record(disturbed)
        if len(scene.runs) > 1:
            record["sibling"] = scene.record(1 - disturbed)
    return record
