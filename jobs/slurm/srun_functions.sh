# Handlers, since srun would inherit ignored signals. On TERM srun kills its ranks; for them USR1 means the same.
forward() { [ -z "$step" ] || kill -s "$1" "$step"; }
trap 'forward USR1' TERM; trap 'forward USR2' USR1 USR2
srun() {  # in the background, because a shell that waits for a foreground command handles no signal
  (exec srun "$@") & step=$!
  while wait "$step"; code=$?; [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do :; done
  step=; return "$code"
}
