# Boot a host of the machine room: host.sh FOLDER NUMBER. Its own PID namespace makes the death of one process a power cut,
# and keeps the `pkill -f` of DeepSpeed's launcher on the host.
folder=$1 name=n$2
env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 SLURM_CONF="$folder/slurm.conf" \
    setsid nsenter --net="/run/netns/$name" unshare --uts --mount --pid --fork --kill-child=KILL --mount-proc bash -c '
        mount -t tmpfs tmpfs /dev/shm
        mount -t tmpfs tmpfs /var/tmp
        hostname "$1"
        slurmd -N "$1"
        /usr/sbin/sshd -f "$0/sshd_config" -o ListenAddress=$(sed -n "s/ $1\$//p" /etc/hosts)
        sleep infinity & while true; do wait; done' "$folder" "$name" < /dev/null >> "$folder/log/$name.log" 2>&1 &
echo $! > "$folder/$name.pid"
