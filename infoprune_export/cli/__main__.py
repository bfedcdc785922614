from infoprune_export.cli import main

main()
