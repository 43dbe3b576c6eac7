#!/bin/sh
# On a CPU, jemalloc lets a step of training take the memory of the one before, which glibc gives back, for the kernel to
# map and clear again. For training alone: OpenVINO, which export may use, aborts with it.
case $1 in train | torchrun)
  export LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0
esac
if [ "$1" != torchrun ]; then set -- cliphar "$@"; fi
exec "$@"
