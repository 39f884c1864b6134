"""The site of a storm whose runs have node agents: they go on in their jobs after the first fault since a checkpoint,
and the run of two nodes after a lost node, on a spare one."""

from tests.harness.storm_site import NODES, StormSite
from tests.storm.faults import AGENTS


class AgentsStormSite(StormSite):
    name = AGENTS
    restarts_at_once = True
    form = f"{StormSite.form}, node agents, a spare node for the run of two"

    def options(self):
        return {"nodes": NODES + 1}

    def profile_text(self):
        return "agents: true\n"

    @staticmethod
    def _placed(layout):
        fields = StormSite._placed(layout)
        if layout.nodes > 1:
            fields["resources"]["spares"] = 1
        return fields
