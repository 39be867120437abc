#!/usr/bin/env bash
# A Kubernetes cluster of one node on this machine, for the tests: etcd, API server, controllers,
# scheduler, kubelet, containerd, runc. Run by the tests; needs root.
#
#   node.sh up DIR             start all of it; state, logs, kubeconfig and sockets are in DIR
#   node.sh cri DIR            start containerd with its CRI plugin alone
#   node.sh stop DIR NAME      stop one part, such as apiserver
#   node.sh start DIR NAME     start it again, as it was
#   node.sh down DIR           stop all of it and remove what it made
#
# The programs of Kubernetes come from the directory or .tar.xz that PODFLAME_TEST_KUBERNETES names; all
# else is Debian's (`cargo xtask test` installs it). Pods have one image, localhost/pause:1, which
# holds a program that waits; what they run is mounted from this machine.
set -eu
verb=${1:?up, cri, stop, start or down}
dir=${2:?a directory for its state}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
sock=$dir/containerd.sock
root=podflame-node
api=https://127.0.0.1:26443
sysctls="vm.overcommit_memory kernel.panic kernel.panic_on_oops"

# Its command is kept, so that it can be started again.
launch() { # NAME COMMAND...
  local name=$1
  shift
  printf '%q ' "$@" >"$dir/$name.cmd"
  again "$name"
}
again() { # NAME
  # In a session of its own: Ctrl-C at the tests leaves the order of the end to them.
  eval "exec setsid nohup $(cat "$dir/$1.cmd")" >>"$dir/$1.log" 2>&1 </dev/null &
  echo $! >"$dir/$1.pid"
}
stop() { # NAME
  [ -f "$dir/$1.pid" ] || return 0
  local pid
  pid=$(cat "$dir/$1.pid")
  rm -f "$dir/$1.pid"
  kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
  kill -KILL "$pid" 2>/dev/null || true
}
await() { # SECONDS WHAT COMMAND...
  local n=$1 what=$2
  shift 2
  for _ in $(seq $((n * 5))); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
  echo "node.sh: $what did not come up in $n s" >&2
  tail -n 5 "$dir"/*.log >&2
  exit 1
}
ask() { curl -fsk -H 'Authorization: Bearer test-token' "$api$1"; }
node_ready() {
  ask /api/v1/nodes/node1 | tr -d ' \n' |
    grep -q '"status":"True","lastHeartbeatTime":[^}]*"reason":"KubeletReady"'
}

# An image with one static program, as an OCI archive.
pause_image() {
  local work=$dir/image
  mkdir -p "$work/blobs/sha256" "$work/root"
  cat >"$work/pause.c" <<'C'
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void end(int s) { _exit(0); }
static void reap(int s) { while (waitpid(-1, 0, WNOHANG) > 0); }
int main(void) {
  signal(SIGINT, end); signal(SIGTERM, end); signal(SIGCHLD, reap);
  for (;;) pause();
}
C
  gcc -O2 -static -o "$work/root/pause" "$work/pause.c"
  tar -C "$work/root" -cf "$work/layer" pause
  blob() { # FILE: its digest and size, as JSON
    local sum
    sum=$(sha256sum "$1" | cut -d' ' -f1)
    cp "$1" "$work/blobs/sha256/$sum"
    echo "\"digest\":\"sha256:$sum\",\"size\":$(stat -c %s "$1")"
  }
  local type=application/vnd.oci.image layer config manifest
  layer=$(blob "$work/layer")
  echo "{\"architecture\":\"$(dpkg --print-architecture)\",\"os\":\"linux\",\"config\":{\"Entrypoint\":[\"/pause\"]},\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[\"sha256:$(sha256sum "$work/layer" | cut -d' ' -f1)\"]}}" >"$work/config"
  config=$(blob "$work/config")
  echo "{\"schemaVersion\":2,\"mediaType\":\"$type.manifest.v1+json\",\"config\":{\"mediaType\":\"$type.config.v1+json\",$config},\"layers\":[{\"mediaType\":\"$type.layer.v1.tar\",$layer}]}" >"$work/manifest"
  manifest=$(blob "$work/manifest")
  echo "{\"schemaVersion\":2,\"manifests\":[{\"mediaType\":\"$type.manifest.v1+json\",$manifest,\"annotations\":{\"io.containerd.image.name\":\"localhost/pause:1\",\"org.opencontainers.image.ref.name\":\"1\"}}]}" >"$work/index.json"
  echo '{"imageLayoutVersion":"1.0.0"}' >"$work/oci-layout"
  tar -C "$work" -cf "$dir/image.tar" oci-layout index.json blobs
  ctr -a "$sock" -n k8s.io image import "$dir/image.tar" >/dev/null
}

cri() {
  mkdir -p "$dir/cni"
  ip netns list 2>/dev/null | awk '{print $1}' >"$dir/netns.before" || true
  cat >"$dir/containerd.toml" <<C
version = 2
root = "$dir/containerd-root"
state = "$dir/containerd-state"
disabled_plugins = ["io.containerd.snapshotter.v1.devmapper","io.containerd.snapshotter.v1.zfs","io.containerd.snapshotter.v1.btrfs","io.containerd.snapshotter.v1.aufs","io.containerd.internal.v1.opt"]
[grpc]
  address = "$sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$dir/cni"
C
  echo "{\"cniVersion\":\"0.4.0\",\"name\":\"pods\",\"plugins\":[{\"type\":\"ptp\",\"ipMasq\":false,\"ipam\":{\"type\":\"host-local\",\"subnet\":\"10.90.0.0/24\",\"dataDir\":\"$dir/ipam\"}}]}" >"$dir/cni/10-pods.conflist"
  launch containerd containerd -c "$dir/containerd.toml"
  await 30 containerd ctr -a "$sock" version
  pause_image
}

up() {
  local bin=${PODFLAME_TEST_KUBERNETES:?the directory or archive that has the programs of Kubernetes}
  if [ -f "$bin" ]; then
    [ -x "$dir/bin/kubelet" ] || { mkdir -p "$dir/bin"; tar -C "$dir/bin" -xJf "$bin"; }
    bin=$dir/bin
  fi
  for s in $sysctls; do echo "$s=$(sysctl -n "$s")"; done >"$dir/sysctl.before"
  cri
  launch etcd etcd --data-dir "$dir/etcd" --listen-client-urls http://127.0.0.1:22379 --advertise-client-urls http://127.0.0.1:22379 --listen-peer-urls http://127.0.0.1:22380
  openssl genrsa -out "$dir/sa.key" 2048 2>/dev/null
  openssl rsa -in "$dir/sa.key" -pubout -out "$dir/sa.pub" 2>/dev/null
  # The second user has no permission at all.
  printf 'test-token,admin,1,system:masters\nno-token,nobody,2\n' >"$dir/tokens.csv"
  for user in test no; do
    cat >"$dir/kubeconfig-$user" <<K
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "$api", insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: $user-token}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
K
  done
  mv "$dir/kubeconfig-test" "$dir/kubeconfig"
  launch apiserver "$bin/kube-apiserver" --etcd-servers=http://127.0.0.1:22379 --service-cluster-ip-range=10.97.0.0/24 --bind-address=127.0.0.1 --secure-port=26443 --cert-dir="$dir/certs" --service-account-issuer=https://k.local --service-account-key-file="$dir/sa.pub" --service-account-signing-key-file="$dir/sa.key" --token-auth-file="$dir/tokens.csv" --authorization-mode=RBAC --disable-admission-plugins=ServiceAccount --allow-privileged
  await 60 'the API server' ask /readyz
  launch controller-manager "$bin/kube-controller-manager" --kubeconfig="$dir/kubeconfig" --bind-address=127.0.0.1 --secure-port=26445 --cert-dir="$dir/cm-certs" --leader-elect=false --use-service-account-credentials --service-account-private-key-file="$dir/sa.key"
  launch scheduler "$bin/kube-scheduler" --kubeconfig="$dir/kubeconfig" --bind-address=127.0.0.1 --secure-port=26447 --cert-dir="$dir/scheduler-certs" --leader-elect=false
  mkdir -p "$dir/manifests"
  cat >"$dir/kubelet.yaml" <<K
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
address: 127.0.0.1
port: 20260
healthzPort: 20261
healthzBindAddress: 127.0.0.1
readOnlyPort: 0
staticPodPath: $dir/manifests
fileCheckFrequency: 1s
cgroupDriver: cgroupfs
cgroupRoot: /$root
cgroupsPerQOS: true
enforceNodeAllocatable: []
failSwapOn: false
makeIPTablesUtilChains: false
maxOpenFiles: 4096
oomScoreAdj: 0
podCIDR: 10.90.0.0/24
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: "10Mi", nodefs.available: "1%"}
resolvConf: ""
K
  for c in /sys/fs/cgroup/*/; do
    [ -w "$c/cgroup.procs" ] && mkdir -p "$c/$root"
  done
  if [ -f "/sys/fs/cgroup/cpuset/$root/cpuset.cpus" ]; then
    cat /sys/fs/cgroup/cpuset/cpuset.cpus >"/sys/fs/cgroup/cpuset/$root/cpuset.cpus"
    cat /sys/fs/cgroup/cpuset/cpuset.mems >"/sys/fs/cgroup/cpuset/$root/cpuset.mems"
  fi
  launch kubelet "$bin/kubelet" --config="$dir/kubelet.yaml" --kubeconfig="$dir/kubeconfig" --root-dir="$dir/kubelet" --container-runtime=remote --container-runtime-endpoint="unix://$sock" --pod-infra-container-image=localhost/pause:1 --hostname-override=node1
  await 60 'the node' node_ready
}

down() {
  for name in kubelet scheduler controller-manager apiserver etcd; do stop "$name"; done
  if [ -S "$sock" ]; then
    for id in $(ctr -a "$sock" -n k8s.io task ls -q 2>/dev/null); do
      ctr -a "$sock" -n k8s.io task kill -s KILL "$id" 2>/dev/null || true
    done
    sleep 1
    for id in $(ctr -a "$sock" -n k8s.io container ls -q 2>/dev/null); do
      ctr -a "$sock" -n k8s.io task rm -f "$id" >/dev/null 2>&1 || true
      ctr -a "$sock" -n k8s.io container rm "$id" >/dev/null 2>&1 || true
    done
  fi
  stop containerd
  awk -v d="$dir/" 'index($2, d) == 1 {print $2}' /proc/mounts | sort -r |
    while read -r m; do umount -l "$m" 2>/dev/null || true; done
  if [ -f "$dir/netns.before" ]; then
    ip netns list 2>/dev/null | awk '{print $1}' | grep '^cni-' | grep -vxFf "$dir/netns.before" |
      while read -r n; do ip netns del "$n" || true; done
  fi
  if [ -f "$dir/sysctl.before" ]; then
    while IFS='=' read -r k v; do sysctl -qw "$k=$v" || true; done <"$dir/sysctl.before"
  fi
  find /sys/fs/cgroup -depth -type d -path "*/$root*" -exec rmdir {} \; 2>/dev/null || true
}

case $verb in
up) up ;;
cri) cri ;;
stop) stop "${3:?what}" ;;
start) again "${3:?what}" ;;
down) down ;;
*)
  echo "node.sh: up, cri, stop, start or down" >&2
  exit 2
  ;;
esac
