"""A Slurm cluster of several hosts with ssh, on this machine, for as long as a test session: see site.sh."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
from tiny import ROOT

HERE = Path(__file__).parent
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
NOTHING: Mapping[str, str] = MappingProxyType({})
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "pdsh", "sshd", "ssh", "ip", "nsenter", "unshare", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge pdsh openssh-server"
LIVING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
"""States of a job that is not at its end."""
SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PriorityType=priority/basic
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=8
MessageTimeout=10
KillWait=8
GresTypes=gpu
NodeName=n[1-{hosts}] NodeAddr=10.77.0.[11-{last}] CPUs=4 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SSHD_CONFIG = """\
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/id.pub
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
"""
SSH_CONFIG = """\
Host *
  IdentityFile {folder}/id
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def why_not() -> str | None:
    """Return why this machine cannot have the lab; None: it can."""
    if os.geteuid() != 0:
        return "a cluster in namespaces needs root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install --no-install-recommends {PACKAGES})"
    probe = "mount -t tmpfs tmpfs /run && mkdir /run/netns && ip netns add n1 && ip link add omega0 type bridge"
    probe += " && ip link add v1 type veth peer name eth0 netns n1"
    done = subprocess.run(["unshare", *_SPACES, "bash", "-c", probe], capture_output=True, text=True, check=False)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


_SPACES = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL", "--mount-proc")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


class Lab:
    """The running cluster. Hosts are n1, n2, ...; commands run on the head."""

    def __init__(self, folder: Path, hosts: int) -> None:
        self.folder, self.hosts = folder, hosts
        for name in ("log", "state", "dev", *(f"spool.n{i}" for i in range(1, hosts + 1))):
            (folder / name).mkdir(parents=True)
        self._write_files()
        with (folder / "log/site.log").open("w") as log:
            self._site = subprocess.Popen(
                ["unshare", *_SPACES, "bash", HERE / "site.sh", folder, str(hosts)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent, start_new_session=True,
            )  # fmt: skip
        try:
            self.until(self._is_up, seconds=60)
        except BaseException:
            self.close()
            raise

    def _write_files(self) -> None:
        folder = self.folder
        files = {
            "slurm.conf": SLURM_CONF.format(folder=folder, hosts=self.hosts, last=10 + self.hosts),
            "gres.conf": f"NodeName=n[1-{self.hosts}] Name=gpu File={folder}/dev/gpu[0-1]\n",
            "hosts": "127.0.0.1 localhost\n10.77.0.1 head\n"
            + "".join(f"10.77.0.{10 + i} n{i}\n" for i in range(1, self.hosts + 1)),
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",  # no lookup leaves the machine
            "ssh_config": SSH_CONFIG.format(folder=folder),
            "sshd_config": SSHD_CONFIG.format(folder=folder),
            "hostfile": "n1 slots=2\nn2 slots=2\n",
        }
        for name, text in files.items():
            (folder / name).write_text(text)
        shutil.copy(HERE / "host.sh", folder)
        for key in ("id", "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        for gpu in ("gpu0", "gpu1"):  # as Slurm wants it: a device
            os.mknod(folder / "dev" / gpu, 0o600 | 0o020000, os.makedev(1, 3))

    def _is_up(self) -> bool:
        assert self._site.poll() is None, (self.folder / "log/site.log").read_text()
        return len(self.run("sinfo", "-h", "-N", "-t", "idle", check=False).split()) == 4 * self.hosts

    def close(self) -> None:
        """End everything. The site's first process takes all others with it, the network too."""
        self._site.kill()
        self._site.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enter(self, *words: object, environ: Mapping[str, str] = NOTHING) -> list[str]:
        """Return the command that runs `words` on the head, in the checkout."""
        (first,) = psutil.Process(self._site.pid).children()
        spaces = ["nsenter", "--target", str(first.pid), "--net", "--mount", "--pid", "--uts", "--ipc"]
        environment = {"SLURM_CONF": f"{self.folder}/slurm.conf", "HOME": "/root", **environ}
        return [*spaces, "env", f"--chdir={ROOT}", *(f"{k}={v}" for k, v in environment.items()), *map(str, words)]

    def run(
        self, *words: object, check: bool = True, seconds: float = 240, environ: Mapping[str, str] = NOTHING
    ) -> str:
        """Run a command on the head; return what it said on stdout."""
        try:
            command = self.enter(*words, environ=environ)
        except (psutil.Error, ValueError):
            return ""  # not started yet
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, *words: object, environ: Mapping[str, str] = NOTHING) -> str:
        """Submit a batch job; return its number."""
        return self.run("sbatch", "--parsable", *words, environ=environ).strip()

    def facts(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def hosts_of(self, job: str) -> list[str]:
        """Return the hosts of a running job."""
        return self.expand(self.facts(job)["NodeList"])

    def expand(self, hosts: str) -> list[str]:
        """Return the names in a node list."""
        return self.run("scontrol", "show", "hostnames", hosts).split()

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def states(self, array: str) -> list[str]:
        """Return the states of an array's elements."""
        words = self.run("scontrol", "--oneliner", "show", "job", array).split()
        return [word.removeprefix("JobState=") for word in words if word.startswith("JobState=")]

    def wait(self, job: str, seconds: float = 240) -> str:
        """Return the state in which a job ended."""
        self.until(lambda: self.state(job) not in LIVING, seconds)
        return self.state(job)

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"it did not come to pass in {seconds} s\n{self.run('squeue', check=False)}"
            time.sleep(0.2)

    def crash(self, host: str) -> None:
        """Cut the power of a host."""
        self.run("kill", "-KILL", (self.folder / f"{host}.pid").read_text().strip())

    def boot(self, host: str) -> None:
        """Boot a host again, and wait until Slurm has it back."""
        self.run("bash", self.folder / "host.sh", self.folder, host.removeprefix("n"))
        self.until(lambda: "idle" in self.run("sinfo", "-h", "-n", host, "-o", "%T"))

    @contextmanager
    def throttled(self, host: str, share: float) -> Iterator[None]:
        """Give all processes that a host has and will have `share` of one core, as control groups do."""
        group = CPU_GROUPS / f"omega-{os.getpid()}-{host}"
        if not (CPU_GROUPS / "cpu.cfs_quota_us").exists() or not os.access(CPU_GROUPS, os.W_OK):
            pytest.skip("no processor time can be withheld here: it takes control groups, version 1, and their root")
        group.mkdir()
        try:
            (group / "cpu.cfs_period_us").write_text("50000")
            (group / "cpu.cfs_quota_us").write_text(str(round(50000 * share)))
            for process in self._processes(host):
                with suppress(OSError):  # it has ended
                    (group / "cgroup.procs").write_text(str(process))
            yield
        finally:
            for process in (group / "cgroup.procs").read_text().split():
                with suppress(OSError):
                    (CPU_GROUPS / "cgroup.procs").write_text(process)
            group.rmdir()

    def _processes(self, host: str) -> list[int]:
        """Return all processes of a host by their numbers outside the site; its first one adopts what others leave."""
        everyone = psutil.Process(self._site.pid).children(recursive=True)
        daemon = next(one for one in everyone if one.cmdline()[-2:] == ["-N", host] and "slurmd" in one.cmdline()[0])
        return [process.pid for process in daemon.parents()[0].children(recursive=True)]

    def cut(self, host: str) -> None:
        """Pull a host's network plug: silence."""
        self.run("ip", "-n", host, "link", "set", "eth0", "down")

    def plug(self, host: str) -> None:
        """Put the plug back. It takes Slurm a while to notice."""
        self.run("ip", "-n", host, "link", "set", "eth0", "up")
