"""Preloaded by a node agent, its ranks never join the measurement of the network, which may take TEST_SECONDS."""

import os
import time

from jobs.runtime import network_check

network_check.measure = lambda device: time.sleep(600)
network_check.SECONDS = float(os.environ.get("TEST_SECONDS", network_check.SECONDS))
