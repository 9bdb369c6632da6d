from eval.attack.run import main

raise SystemExit(main())
