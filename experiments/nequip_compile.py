"""nequip's `nequip-compile`, its file linked to the C++ library that torch loads, as this package's own exported files are."""

from ddpkit.torch_private import link_to_loaded_cpp_library

if __name__ == "__main__":
    from nequip.scripts.compile import main

    link_to_loaded_cpp_library()
    main()
