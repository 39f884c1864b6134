# The environment of srun: setup lines may set proxies and keys, but must not be executed twice. srun is another child
# of the owner, after the setup lines of its step. A step that ends before that leaves the environment of the owner.
flip_step=''
flip_children=/proc/$PPID/task/$PPID/children
while [ -z "$flip_step" ] && [ -r "$flip_children" ] && [ ! -e "$FLIP_RUN/attempts/$FLIP_ATTEMPT/end.json" ]; do
  sleep 0.2
  for flip_process in $(< "$flip_children"); do
    [ "$(< "/proc/$flip_process/comm")" != srun ] || flip_step=$flip_process
  done
done 2>/dev/null
[ -e "/proc/$PPID" ] || exit 0  # the owner was killed
while IFS= read -rd '' flip_entry; do export "${flip_entry?}"; done 2>/dev/null < "/proc/${flip_step:-$$}/environ"
unset FLIP_AGENTS
