# shellcheck shell=bash
# Sourced by everything that starts or joins a Ray of ours:   source launch/ray_security.sh [TOKEN_FILE]
#
# Every port of Ray then asks for the token, except the ones below, which cannot and are therefore not opened:
#   metrics exporter of each node, of the autoscaler and of the dashboard (plain HTTP, every interface)
# TATAR_METRICS=1 opens them all the same, for a Prometheus behind a firewall. FILE is made, mode 600, when it is not
# there. The token itself is in no environment and no command line.

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:?must name the file of the token}
unset RAY_AUTH_TOKEN
if [[ ! -e $RAY_AUTH_TOKEN_PATH ]]; then
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
fi
if [[ ${TATAR_METRICS:-} != 1 ]]; then
    export RAY_enable_metrics_collection=0
    export AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1 # no port number: Ray logs it and goes on without
fi
export RAY_USAGE_STATS_ENABLED=0
