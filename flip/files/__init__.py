"""How does the toolkit write and delete files beside other users, who may prepare links, or change what they may write?

- ``creation``: makes folders of runs and caches, and opens files to write, closed to others and never through a link.
- ``deletion``: the only calls that delete files and folders.
- ``ownership``: who owns a path, who may write to it, and who may exchange it through a folder above.
- ``acl``: access control lists of files and folders.
- ``current_folder``: leaves the current folder before a library reads its settings there.
- ``python_path``: where the Python processes that we start find modules.

SECURITY.md has the rules, and the test of each. Trainer, launcher and the host's batch script share these modules:
standard library only, Python >= 3.6. Imports nothing else of the toolkit.
"""
