from eval.report.build import main

raise SystemExit(main())
