#!/usr/bin/env bash
# Ray on the nodes of a Slurm job: up, one stage on the first node, down again. sft.sh, grpo.sh and eval.sh source this
# and call `run_stage STAGE ARGUMENTS...`; on each node srun executes it as `ray_cluster.sh node|driver COMMAND...`.
#
# The job ends with the stage's exit status. A stage that was asked to stop and has left its checkpoint (75), or that
# was killed, is requeued and goes on where it was. A node whose Ray ends while the job lives starts it again; one that
# finds the first node gone requeues the job: with --no-kill Slurm leaves such a job running without its script.
#
# Environment, all optional:
#   TATAR_ACTIVATE       script sourced on every node first (modules, conda, venv); default: .venv/bin/activate
#   TATAR_CONTAINER      prefix of every command, for example "apptainer exec --nv image.sif"; then no .venv is activated
#   TATAR_INTERFACE      network device of the cluster's traffic, for example ib0; default: the address Slurm uses
#   TATAR_START_TIMEOUT  seconds for all nodes to join (300)
#   TATAR_MAX_REQUEUES   (20)
#   TATAR_METRICS        1 = metrics for Prometheus, on ports that ask for no token (launch/ray_security.sh)
#   TATAR_DASHBOARD      1 = Ray's dashboard, on the first node's loopback
#   TATAR_TMPDIR         node-local directory with a short path; Ray's files of the job lie there while it runs (/tmp)
#   TATAR_LOGS           shared directory for the nodes' logs and the job's token (runs/slurm)
#   TATAR_RAY_ARGS       more arguments of `ray start`
set -euo pipefail

say() { echo "$stage: $*" >&2; }

die() { # STATUS MESSAGE
    say "$2"
    exit "$1"
}

activate() {
    read -ra container <<<"${TATAR_CONTAINER:-}"
    local script=${TATAR_ACTIVATE:-}
    [[ -n $script || ${#container[@]} -gt 0 || ! -e .venv/bin/activate ]] || script=.venv/bin/activate
    [[ -n $script ]] || return 0
    set +u # not every environment's script is written for it
    # shellcheck disable=SC1090
    source "$script" || die 1 "TATAR_ACTIVATE=$script failed on ${SLURMD_NODENAME:-$HOSTNAME}"
    set -u
}

# ---- on every node, started by srun -----------------------------------------------------------------------------

# Ray's files of this job on this node
temp_dir() {
    echo "${TATAR_TMPDIR:-/tmp}/tatar-${SLURM_JOB_ID:-JOB}"
}

# Slurm has taken the node of the job's script out of the job
first_node_is_gone() {
    local facts first
    facts=$(scontrol show job "$SLURM_JOB_ID") || return 1
    [[ $facts =~ [[:space:]]BatchHost=([^[:space:]]+) ]] || return 1
    first=${BASH_REMATCH[1]}
    [[ $facts =~ [[:space:]]NodeList=([^[:space:]]+) ]] || return 1
    ! scontrol show hostnames "${BASH_REMATCH[1]}" | grep -qx "$first"
}

# node COMMAND...: keeps `ray start --block` running. Before the whole cluster was up once, a failure is final.
node() {
    local child='' delay=1 status directory
    directory=$(temp_dir)
    # whoever can write there takes part in the cluster, and Ray lets everyone write in its own directory below
    mkdir -m 700 "$directory" 2>/dev/null || [[ -d $directory && ! -L $directory && -O $directory ]] ||
        die 1 "$directory on ${SLURMD_NODENAME:-$HOSTNAME} is another user's, or cannot be made: set TATAR_TMPDIR"
    chmod 700 "$directory"
    trap 'trap "" TERM; [[ -z $child ]] || { kill "$child" && wait "$child"; }; rm -rf "$directory"; exit 143' TERM
    activate
    while :; do
        # shellcheck disable=SC2086
        "${container[@]}" "$@" --num-cpus="${SLURM_CPUS_ON_NODE:-1}" \
            ${SLURM_GPUS_ON_NODE:+--num-gpus=$SLURM_GPUS_ON_NODE} ${TATAR_RAY_ARGS:-} &
        child=$!
        status=0
        wait "$child" || status=$?
        [[ -e $TATAR_JOB/up ]] || die 1 "ray start ended with $status on ${SLURMD_NODENAME:-$HOSTNAME}"
        if first_node_is_gone; then
            if ((${SLURM_RESTART_COUNT:-0} >= ${TATAR_MAX_REQUEUES:-20})); then
                say "the first node is gone after TATAR_MAX_REQUEUES=${TATAR_MAX_REQUEUES:-20} requeues: cancelled"
                scancel "$SLURM_JOB_ID"
            else
                # srun, which wrote this step's log, went with the first node
                say "the first node is gone: requeued, it goes on from its last checkpoint" \
                    2>>"$TATAR_JOB/${SLURMD_NODENAME:-$HOSTNAME}.log" || true
                scontrol requeue "$SLURM_JOB_ID" || true # another node may have done so
            fi
        fi
        say "ray start ended with $status on ${SLURMD_NODENAME:-$HOSTNAME}; again in $delay s"
        sleep "$delay"
        delay=$((delay < 30 ? delay * 2 : 60))
    done
}

driver() {
    activate
    exec "${container[@]}" "$@"
}

# ---- in the batch script, on the first node ---------------------------------------------------------------------

# NODE: its address in the cluster
address_of() {
    local slurm_name device=${TATAR_INTERFACE:-}
    if [[ -n $device ]]; then
        "${step[@]}" --nodelist="$1" ip -4 -o addr show dev "$device" | awk '{sub("/.*", "", $4); print $4; exit}'
    else
        slurm_name=$(scontrol show node "$1" | grep -o 'NodeAddr=[^ ]*')
        getent ahostsv4 "${slurm_name#*=}" | awk '$1 !~ /^127\./ {print $1; exit}'
    fi
}

# The ports that several jobs on one node could fight for. Ray takes free ones for everything given as 0.
ports=(--object-manager-port=0 --node-manager-port=0 --min-worker-port=0 --max-worker-port=0
    --dashboard-agent-listen-port=0 --metrics-export-port=0 --runtime-env-agent-port=0)

# JOB: its first of three ports on the first node: Ray's own, its client server's, the dashboard's
first_port() {
    echo $((20000 + $1 % 2500 * 4)) # below those that are handed out as free ones
}

ports_are_free() { # ADDRESS FIRST_PORT
    local port
    for port in "$2" $(($2 + 1)) $(($2 + 2)); do
        ! (exec 3<>"/dev/tcp/$1/$port") 2>/dev/null || return 1
    done
}

# head_command ADDRESS PORT, worker_command ADDRESS HEAD_ADDRESS PORT: into the array `command`
head_command() {
    command=(ray start --head --node-ip-address="$1" --port="$2" --ray-client-server-port=$(($2 + 1))
        "${ports[@]}"
        --temp-dir="$(temp_dir)/r" --disable-usage-stats)
    if [[ ${TATAR_DASHBOARD:-} == 1 ]]; then
        command+=(--include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port=$(($2 + 2)))
    else
        command+=(--include-dashboard=false)
    fi
    command+=(--block)
}

worker_command() {
    command=(ray start --address="$2:$3" --node-ip-address="$1" "${ports[@]}"
        --temp-dir="$(temp_dir)/r" --disable-usage-stats --block)
}

# ask_for_gpus COUNT: each node's Ray gets so many, the other steps none. Ends the job where a node has fewer.
ask_for_gpus() {
    local few
    # it shows all tasks of an array and all components of a heterogeneous job, too
    few=$(scontrol show job -d "$SLURM_JOB_ID" | awk -v count="$1" -v job="JobId=$SLURM_JOB_ID" '
    /^JobId=/ { ours = $1 == job }
    ours && $1 ~ /^Nodes=/ && / GRES=/ {
        nodes = substr($1, 7)
        sub(/.* GRES=/, "")
        for (has = 0; match($0, /gpu:([^(),:]+:)?[0-9]+/); $0 = substr($0, RSTART + RLENGTH)) {
            n = split(substr($0, RSTART, RLENGTH), words, ":")
            has += words[n]
        }
        if (has < count) print has " on " nodes
    }' | sort -n)
    [[ -z $few ]] || die 2 "too few GPUs in this job for cluster.gpus_per_node=$1 (${few//$'\n'/, }): submit it with \
sbatch --gpus-per-node=$1, or set cluster.gpus_per_node=${few%% *}"
    # a step gets what sbatch was asked for: none for --exclusive alone, too many for the --gpus of the whole job
    unset "${!SLURM_GPUS@}" SLURM_TRES_PER_TASK
    step+=(--gres=none)
    ray_gpus=(--gres="gpu:$1")
}

# on_node NODE LOG ROLE COMMAND...: a background step; its srun's number is in $!
on_node() {
    local name=$1 log=$2
    shift 2
    "${step[@]}" "${ray_gpus[@]}" --nodelist="$name" --output="$log" --error="$log" --open-mode=append \
        bash slurm/ray_cluster.sh "$@" &
}

dry_run() { # SCRIPT ARGUMENTS...
    # shellcheck disable=SC2016
    local port all='--num-cpus=$SLURM_CPUS_ON_NODE ${SLURM_GPUS_ON_NODE:+--num-gpus=$SLURM_GPUS_ON_NODE}'
    port=$(first_port "${SLURM_JOB_ID:-0}")
    echo "# ${SLURM_JOB_NUM_NODES:-N} node(s), a token of the job's own, logs in ${TATAR_LOGS:-runs/slurm}/job-${SLURM_JOB_ID:-JOB}"
    head_command FIRST_NODE "$port"
    echo "${container[*]}${container:+ }${command[*]} $all ${TATAR_RAY_ARGS:-}    # on the first node"
    worker_command NODE FIRST_NODE "$port"
    echo "${container[*]}${container:+ }${command[*]} $all ${TATAR_RAY_ARGS:-}    # on each other node"
    printf 'RAY_ADDRESS=FIRST_NODE:%s ' "$port"
    printf '%q ' "${container[@]}" python "$@"
    printf '   # on the first node\n'
    shift
    "${container[@]}" python -m tatar_dist plan --stage "${stage/eval/evaluate}" "$@"
}

clean_up() {
    [[ -z ${steps[*]} ]] || kill "${steps[@]}" 2>/dev/null || true
    wait || true
    rm -f "${RAY_AUTH_TOKEN_PATH:-}"
}

# To what is being waited for: the driver, or what waits for the nodes, whose end it is
forward() {
    interrupted=1
    [[ -z $awaited ]] || kill -USR1 "$awaited" 2>/dev/null || true
}

# Until PID has ended, whatever signals come meanwhile; its exit status into `status`
wait_for() {
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    status=0
    wait "$1" || status=$?
}

# These nodes are in the cluster, or the job ends and says which one is not.
wait_for_nodes() { # NAME=ADDRESS...
    local i log timeout=${TATAR_START_TIMEOUT:-300}
    "${container[@]}" python launch/ray_nodes.py "$address" "$timeout" "$@" 2>"$TATAR_JOB/nodes.log" &
    awaited=$!
    [[ -z $interrupted ]] || forward # it came in between
    while kill -0 "$awaited" 2>/dev/null; do
        wait -n "$awaited" "${steps[@]}" || true # the first to end, or a signal
        [[ -z $interrupted ]] || break
        for i in "${!steps[@]}"; do
            kill -0 "${steps[i]}" 2>/dev/null && continue
            kill "$awaited" 2>/dev/null || true
            log=$TATAR_JOB/${nodes[i]}.log
            die 1 "node ${nodes[i]} did not come: $(tail -n 1 "$log" 2>/dev/null) (all of it: $log)"
        done
    done
    wait_for "$awaited"
    awaited=''
    [[ -z $interrupted ]] || requeue_or_exit 75
    [[ $status == 0 ]] || die 1 "$(cat "$TATAR_JOB/nodes.log"); logs of the nodes are in $TATAR_JOB"
}

requeue_or_exit() { # STATUS
    local restarts=${SLURM_RESTART_COUNT:-0} most=${TATAR_MAX_REQUEUES:-20} head_is_up=1
    [[ -z ${steps[*]} ]] || kill -0 "${steps[0]}" 2>/dev/null || head_is_up=''
    # 75: stopped after a checkpoint; from 128: killed; anything while being told to stop or with Ray's head gone
    if (($1 == 75 || $1 >= 128)) || { (($1 != 0 && $1 != 2)) && [[ -n $interrupted || -z $head_is_up ]]; }; then
        if ((restarts >= most)); then
            say "ended with $1 after $restarts requeues (TATAR_MAX_REQUEUES=$most)"
        elif scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then # not one that was cancelled
            clean_up
            if scontrol requeue "$SLURM_JOB_ID"; then
                say "ended with $1: requeued, it goes on from its last checkpoint"
                exit 0
            fi
            say "ended with $1, and Slurm does not requeue it"
        fi
    fi
    exit "$1"
}

run_stage() { # STAGE ARGUMENTS...
    stage=$1
    shift
    local script=launch/$stage.py config=configs/$stage.yaml word nodes_given='' interface_given='' dry=''
    [[ $stage != eval ]] || script=launch/evaluate.py
    local arguments=() given_config='' plan slurm_config ray_gpus=()
    for word; do
        case $word in
            --dry-run) dry=1 && continue ;;
            --config | --config=*) given_config=1 ;;
            cluster.nodes=*) nodes_given=1 ;;
            cluster.network_interface=*) interface_given=1 ;;
        esac
        arguments+=("$word")
    done
    [[ -n $given_config ]] || arguments=(--config "$config" "${arguments[@]}")
    [[ -n $nodes_given ]] || arguments+=("cluster.nodes=${SLURM_JOB_NUM_NODES:-1}")
    [[ -z ${TATAR_INTERFACE:-} || -n $interface_given ]] || arguments+=("cluster.network_interface=$TATAR_INTERFACE")

    activate
    if [[ -n $dry ]]; then
        dry_run "$script" "${arguments[@]}"
        return
    fi
    [[ -n ${SLURM_JOB_ID:-} ]] || die 2 "runs inside a Slurm job: sbatch --nodes=N slurm/$stage.sh ..."
    # what is wrong with the configuration is said before a cluster is started for it
    plan=$("${container[@]}" python "$script" "${arguments[@]}" --dry-run --json) || exit $?

    step=(srun --quiet --overlap --no-kill --kill-on-bad-exit=0 --nodes=1 --ntasks=1)
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    slurm_config=$(scontrol show config)
    # a Slurm that counts no GPUs leaves them to Ray's own detection
    if [[ $plan =~ '"gpus_per_node": '([1-9][0-9]*) ]] && grep -q '^GresTypes .*gpu' <<<"$slurm_config"; then
        ask_for_gpus "${BASH_REMATCH[1]}"
    fi
    local i port addresses=() pairs=()
    steps=() awaited=''
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    for i in "${!nodes[@]}"; do
        addresses[i]=$(address_of "${nodes[i]}") || true
        [[ -n ${addresses[i]} ]] || die 1 "node ${nodes[i]} has no address${TATAR_INTERFACE:+ on $TATAR_INTERFACE}"
        pairs[i]=${nodes[i]}=${addresses[i]}
    done
    port=$(first_port "$SLURM_JOB_ID")
    until ports_are_free "${addresses[0]}" "$port"; do port=$((port + 4)); done

    export TATAR_JOB=${TATAR_LOGS:-runs/slurm}/job-$SLURM_JOB_ID TATAR_STAGE=$stage PYTHONUNBUFFERED=1
    # a step of one task would be bound to one core, and all of Ray with it
    if ! grep -q '^TaskPlugin .*task/none' <<<"$slurm_config"; then export SLURM_CPU_BIND=none; fi
    mkdir -p "$TATAR_JOB"
    TATAR_JOB=$(cd "$TATAR_JOB" && pwd)
    rm -f "$TATAR_JOB/up"
    rm -f "$TATAR_JOB/token"
    export RAY_AUTH_TOKEN_PATH=$TATAR_JOB/token
    source launch/ray_security.sh
    unset RAY_ADDRESS
    trap forward USR1 TERM
    trap clean_up EXIT

    head_command "${addresses[0]}" "$port"
    on_node "${nodes[0]}" "$TATAR_JOB/${nodes[0]}.log" node "${command[@]}"
    steps+=($!)
    address=${addresses[0]}:$port
    wait_for_nodes "${pairs[0]}"
    for ((i = 1; i < ${#nodes[@]}; i++)); do
        worker_command "${addresses[i]}" "${addresses[0]}" "$port"
        on_node "${nodes[i]}" "$TATAR_JOB/${nodes[i]}.log" node "${command[@]}"
        steps+=($!)
    done
    wait_for_nodes "${pairs[@]}"
    touch "$TATAR_JOB/up"

    say "Ray is up on ${#nodes[@]} node(s), driver on ${nodes[0]}"
    RAY_ADDRESS=$address "${step[@]}" --nodelist="${nodes[0]}" bash slurm/ray_cluster.sh driver python "$script" "${arguments[@]}" &
    awaited=$!
    [[ -z $interrupted ]] || forward # it came in between
    wait_for "$awaited"
    requeue_or_exit "$status"
}

container=() interrupted=${interrupted:-} stage=${TATAR_STAGE:-}
case ${1:-} in
    node | driver) [[ ${BASH_SOURCE[0]} != "$0" ]] || "$@" ;;
esac
