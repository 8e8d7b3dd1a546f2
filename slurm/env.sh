# What this cluster is like: the one file to edit before the first `python -m slurm.submit`, which copies it into every
# job. Lines are NAME=value or `export NAME=value`, in bash's syntax; $HOME, $USER and the like may be used, $(...) not.

# Where jobs go. Empty: the cluster's default. A stage may name another partition in its chain's YAML.
PARTITION=
ACCOUNT=
QOS=

# What jobs load first: names for `module load`, and a bash file to source for anything else.
MODULES=
SETUP=

# The Python with this project's packages, as compute nodes (or the container) see it. Empty: the one that submits, or
# `python` in a container.
PYTHON=

# none, pyxis or apptainer; IMAGE is a .sqsh or .sif file, or docker://...; MOUNTS are host folders, comma-separated,
# each `folder` or `folder:inside`. This repository, the run folder and SCRATCH are always mounted.
CONTAINER=none
IMAGE=
MOUNTS=

# The network that ranks talk over, as `ip link` names it (ib0, bond0, ...). Empty: NCCL and gloo choose.
NETWORK_INTERFACE=

# A node's own disk: compile caches and Ray's temporary files.
SCRATCH=/tmp

# Anything else that jobs are to have in their environment, for example:
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN
# export FI_PROVIDER=efa
# export MUJOCO_GL=egl
# export HF_HOME=/shared/huggingface
