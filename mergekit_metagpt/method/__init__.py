"""The merge methods that MergeKit sees."""

# Before any module of this folder: MergeKit's registry, once it is there, imports
# `merge_method`, which must not find one of its neighbours half imported.
import mergekit.merge_methods  # noqa: F401
