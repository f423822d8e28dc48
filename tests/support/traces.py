"""Write small traces with the column names that Nsight Systems gives them."""

import sqlite3

ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


GEMM = "nvjet_tst_192x192_64x4_1x2_h_bz_TNT"


ADD = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"
    "(int, at::native::CUDAFunctor_add<float>)"
)


PROCESS = 0x1000000  # of a globalPid, and of a globalTid above its thread


SCHEMAS = {
    "StringIds": "id INTEGER PRIMARY KEY, value TEXT NOT NULL",
    "NVTX_EVENTS": "start INT NOT NULL, end INT, eventType INT NOT NULL, rangeId INT, "
    "category INT, color INT, text TEXT, globalTid INT, endGlobalTid INT, textId INT, "
    "domainId INT, uint64Value INT",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start INT NOT NULL, end INT NOT NULL, deviceId INT NOT NULL, "
    "contextId INT NOT NULL, streamId INT NOT NULL, correlationId INT, globalPid INT, "
    "demangledName INT NOT NULL, shortName INT NOT NULL",
}


def nsys(path, kernels=(), events=(), tables=tuple(SCHEMAS)):
    """Write a trace as Nsight Systems exports it; return its path.

    Args:
        path: the file.
        kernels: (process, device, stream, start, end, name) of each.
        events: (start, end, type, process, domain, text, registered) of each NVTX event.
        tables: the tables that the file has.
    """
    db = sqlite3.connect(path)
    for table in tables:
        db.execute(f"CREATE TABLE {table} ({SCHEMAS[table]})")

    def insert(table, *row):
        places = ",".join("?" * len(row))
        return db.execute(f"INSERT INTO {table} VALUES ({places})", row).lastrowid

    def string(value):
        found = db.execute("SELECT id FROM StringIds WHERE value = ?", (value,)).fetchone()
        return found[0] if found else insert("StringIds", None, value)

    for process, device, stream, start, end, name in kernels:
        names = string(name), string(name.partition("<")[0])
        where = device, 1, stream, 0, process * PROCESS
        insert("CUPTI_ACTIVITY_KIND_KERNEL", start, end, *where, *names)
    for start, end, kind, process, domain, text, registered in events:
        inline, text_id = (None, string(text)) if registered else (text, None)
        thread = process * PROCESS + 5
        nothing = None, None, None
        insert(
            "NVTX_EVENTS", start, end, kind, *nothing, inline, thread, None, text_id, domain, None
        )
    db.commit()
    db.close()
    return path


KERNELS = [
    # Device 0 has two all-reduces. The first is under a GEMM in 100 of 200 ns and under an add in
    # 20 more, the second is exposed.
    (7, 0, 1, 0, 300, GEMM),
    (7, 0, 2, 200, 400, ALL_REDUCE),
    (7, 0, 1, 350, 370, ADD),
    (7, 0, 2, 1000, 1100, ALL_REDUCE),
    # Device 1 has kernels within a GEMM and within an all-reduce, touching ones (500, 600), and
    # both collectives at once (700 to 720).
    (7, 1, 1, 0, 500, GEMM),
    (7, 1, 2, 100, 150, ALL_REDUCE),
    (7, 1, 2, 500, 600, ALL_REDUCE),
    (7, 1, 1, 600, 680, GEMM),
    (7, 1, 2, 680, 800, ALL_REDUCE),
    (7, 1, 3, 700, 720, ALL_REDUCE),
    (7, 1, 1, 690, 695, ADD),
    (7, 1, 3, 692, 710, GEMM),
    # Another process on device 0, which hides nothing of the first one's.
    (8, 0, 1, 200, 1200, GEMM),
]
