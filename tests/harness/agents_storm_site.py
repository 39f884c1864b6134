"""The site of a storm whose runs have node agents: they go on in their jobs after the first fault since a commit."""

from tests.harness.storm_site import StormSite
from tests.storm.faults import AGENTS


class AgentsStormSite(StormSite):
    name = AGENTS
    restarts_at_once = True
    form = f"{StormSite.form}, node agents"

    def profile_text(self):
        return "agents: true\n"
