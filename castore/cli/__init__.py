"""The command line: arguments in, calls of the API out; one file per group of commands.

    main       the group, its help, errors to exit codes     exits     the exit codes
    command    what every command shares                     render    sizes, times, tables
    create     init, save, export                            files     .pt and .safetensors files
    history    log, branch, tag                              graph     the lines of the branch graph
    contents   show, diff                                    leaf      one leaf in detail
    upkeep     verify, du, dump, reindex                 safetensors_format   the header of such a file

Start-up is part of the product: `main` loads a command's file only when that command runs, rich only when a
table is drawn on a terminal, numpy only where numbers are looked at, and torch only for reading and writing
tensor files.
"""
