"""``MultiBackend``: jobs of several cluster profiles."""

from collections.abc import Iterable, Sequence

from flip.runs.errors import FlipError
from jobs.backends.table import open_backend
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job


class MultiBackend:
    """Backends of several profiles: ``submit`` passes each job to the backend of its profile."""

    def __init__(self, profiles: Iterable[ClusterProfile]) -> None:
        self.profiles = {profile.name: profile for profile in profiles}

    def submit(self, jobs: Sequence[Job]) -> None:
        submitted = 0
        for name, profile in self.profiles.items():
            own = [job for job in jobs if job.cluster == name]
            try:
                open_backend(profile).submit(own)
            except FlipError as error:
                if not submitted:
                    raise
                what = f"{error.what}; {submitted} runs were submitted to other clusters before and stay"
                raise type(error)(what, error.where, error.value, error.remedy) from error
            submitted += len(own)
