"""Fault injection for a sweep on a real Slurm and a real S3 server: `make storm SEED=3 FAULTS=12 OUT=page.md`."""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path


class Storm:
    """The runs of a storm; proofs and the page read it."""

    def __init__(self, scene, seed, count):
        from tests.storm.run import StormRun

        self.scene = scene
        self.seed = seed
        self.count = count
        self.runs = [StormRun(scene, name, random.Random(f"{seed} {name}")) for name in scene.lines]
        self.submissions = len(list((scene.runs / "storm" / ".slurm").iterdir()))

    def calm(self, run):
        from tests.storm.run import Calm

        return Calm(self.scene.calm, run.run.name)

    def inject_all(self):
        """Inject all faults; returns when all runs are complete, or one has failed."""
        threads = [threading.Thread(target=self._inject, args=[run]) for run in self.runs]
        watchers = [threading.Thread(target=run.watch, daemon=True) for run in self.runs]
        for thread in watchers + threads:
            thread.start()
        for thread in threads + watchers:
            thread.join()

    @property
    def interventions(self):
        """Faults after which a person had to act."""
        return [done for run in self.runs for done in run.done if done.intervention]

    def _inject(self, run):
        from tests.storm.run import GivenUp

        try:
            run.inject(self.scene.dealt.strikes[run.run.name])
        except GivenUp as error:
            run.trouble = str(error)
        except Exception:
            run.trouble = traceback.format_exc()
            self.scene.failed = True
            self.scene.say(f"{run.run.name}: {run.trouble}")
        finally:
            run.quiet.set()

    def settle(self, seconds=300):
        """Wait until the queue is empty and the undisturbed runs are complete."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not self.scene.failed:
            calm = all(self.calm(run).run.result.exists() for run in self.runs)
            if calm and not self.scene.here.call("squeue", "-h", "-o", "%i").strip():
                return
            time.sleep(0.5)

    def prove(self):
        """(property, whether it holds, evidence) of every proof."""
        from tests.storm.proofs import PROOFS

        results = []
        for proof in PROOFS:
            try:
                results.append((proof.__doc__, True, proof(self)))
            except Exception as error:  # a proof that fails with any error does not hold
                frame = traceback.extract_tb(error.__traceback__)[-1]
                results.append((proof.__doc__, False, f"{frame.line}\n{type(error).__name__}: {error}"[:4000]))
            text = " ".join(str(proof.__doc__).split())
            self.scene.say(f"{'yes' if results[-1][1] else 'NO'}  {text}")
        return results


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: from the clock, printed")
    parser.add_argument("--faults", type=int, default=12, help="number of faults (default: %(default)s)")
    parser.add_argument("--site", choices=["home", "foreign", "agents"], default="home", help="form of the Slurm site")
    parser.add_argument("--out", type=Path, help="also write the result page to this file")
    parser.add_argument("--folder", type=Path, help="new folder for all files (default: a temporary one)")
    args = parser.parse_args(arguments)
    if args.faults < 1:
        parser.error("--faults: at least 1")
    from flip.runs.errors import FlipError
    from tools.sandbox import daemons

    try:
        daemons.require_packages(accounting=False)
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything that was started is stopped
    return storm(args)


def storm(args):
    from tests.harness.agents_storm_site import AgentsStormSite
    from tests.harness.foreign_storm_site import ForeignStormSite
    from tests.harness.storm_site import StormSite
    from tests.storm.deal import deal

    site = {"home": StormSite, "foreign": ForeignStormSite, "agents": AgentsStormSite}[args.site]
    print(f"seed {args.seed}, {args.faults} faults, {args.site} site", flush=True)
    if args.folder:
        folder = args.folder.absolute()
    else:
        folder = Path(tempfile.mkdtemp(prefix="storm-"))
    folder.mkdir(exist_ok=not args.folder)
    scene = site(folder, deal(args.seed, args.faults, args.site), lambda text: print(text, flush=True))
    all_hold = False
    try:
        scene.start()
        injection = Storm(scene, args.seed, args.faults)
        injection.inject_all()
        injection.settle()
        all_hold = report(injection, args.out)
    finally:
        scene.failed = True
        scene.stop()
        if all_hold:
            shutil.rmtree(folder)
        else:
            print(f"all files are kept in {folder}")
    return 0 if all_hold else 1


def report(storm, out):
    """Check all properties and write the page; returns whether all hold."""
    from tests.storm.page import page

    proved = storm.prove()
    text = page(storm, proved)
    if out:
        out.write_text(text, encoding="utf-8")
    print(text)
    return all(ok for _, ok, _ in proved)


if __name__ == "__main__":
    sys.exit(main())
