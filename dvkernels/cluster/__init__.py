"""Cluster resolvers: the jobs and tasks of a cluster, and which task this process is.

Imports: errors, user_errors.
"""

from dvkernels.cluster.host_group import HostGroup as HostGroup
from dvkernels.cluster.resolver import ClusterResolver as ClusterResolver
from dvkernels.cluster.resolvers import KubernetesClusterResolver as KubernetesClusterResolver
from dvkernels.cluster.resolvers import MPIClusterResolver as MPIClusterResolver
from dvkernels.cluster.resolvers import SimpleClusterResolver as SimpleClusterResolver
from dvkernels.cluster.resolvers import SlurmClusterResolver as SlurmClusterResolver
from dvkernels.cluster.resolvers import TFConfigClusterResolver as TFConfigClusterResolver
from dvkernels.cluster.resolvers import default_resolver as default_resolver
from dvkernels.cluster.spec import ClusterSpec as ClusterSpec
