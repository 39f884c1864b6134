# A task per node runs the node agent, which starts the ranks of all attempts of this job (docs/restarts.md). Without a
# coordinator, and if an agent cannot reach it, srun starts the ranks, and each restart is a requeue.
srun() {
  coordinator=$FLIP_RUN/attempts/$FLIP_ATTEMPT/coordinator.json
  for _ in {1..500}; do [ ! -e "$coordinator" ] || break; sleep 0.02; done
  if [ -e "$coordinator" ]; then
    FLIP_AGENTS=1 start_step AGENTS_OPTIONS "$@" || :
    # srun has the highest code of its tasks: 137 of one that was killed, also if the run has gone on without it
    ! read -rt 0.1 -u "$agents" said || code=$said
    # an agent of one node may fail to reach the coordinator while others work: their attempt must not start twice
    [ "$code" -eq NO_AGENTS ] && [ ! -e "$FLIP_RUN/logs/$FLIP_ATTEMPT/node0.out" ] || return "$code"
    # nor after the end of an attempt without healthy nodes, which opens no log
    [ ! -e "${coordinator%/*}/end.json" ] || return "$code"
  fi
  rm -f "$coordinator" || :  # it would prove that agents have started the ranks
  echo "no node agents: srun starts the ranks, and each restart is a requeue" >&2
  start_step RANKS_OPTIONS "$@"
}
