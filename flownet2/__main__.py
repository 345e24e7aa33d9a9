"""`python -m flownet2`, the same as `flownet2`."""

from flownet2.command import main

main()
