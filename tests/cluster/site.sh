# A machine room in namespaces: a network with a head and some hosts, Slurm and ssh on them. site.sh FOLDER HOSTS
# Runs as the first process of its own network, mount, PID and UTS namespaces: when it dies everything dies with it, and
# nothing of it is ever seen outside (no interface, mount, host name, file but those in FOLDER).
set -eu
folder=$1 hosts=$2
mount -t tmpfs tmpfs /run
mkdir -p /run/munge /run/sshd /run/netns
mount -t tmpfs tmpfs /dev/shm
for file in hosts nsswitch.conf ssh/ssh_config; do
    mount --bind "$folder/${file##*/}" "/etc/$file"
done
hostname head
ip link set lo up
ip link add omega0 type bridge
ip addr add 10.77.0.1/24 dev omega0
ip link set omega0 up
for i in $(seq "$hosts"); do
    ip netns add "n$i"
    ip link add "v$i" type veth peer name eth0 netns "n$i"
    ip link set "v$i" master omega0 up
    ip -n "n$i" link set lo up
    ip -n "n$i" addr add "10.77.0.$((10 + i))/24" dev eth0
    ip -n "n$i" link set eth0 up
done

mungekey --create --keyfile=/run/munge/munge.key
chown -R munge:munge /run/munge
setpriv --reuid munge --regid munge --clear-groups munged --key-file=/run/munge/munge.key --seed-file=/run/munge/seed \
    --pid-file=/run/munge/munged.pid --log-file=/run/munge/munged.log
export SLURM_CONF="$folder/slurm.conf"
slurmctld
for i in $(seq "$hosts"); do
    bash "$folder/host.sh" "$folder" "$i"
done
sleep infinity &
while true; do wait || true; done # adopts and buries what the daemons leave
