"""The merge methods that MergeKit sees."""

# MergeKit is imported before any module of this folder. As soon as MergeKit's registry is
# imported, the start-up file imports `merge_method`, which needs the other modules complete.
import mergekit.merge_methods  # noqa: F401
