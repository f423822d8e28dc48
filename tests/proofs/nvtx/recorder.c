/* An NVTX tool: writes every event of this process to $NVTX_RECORD.<pid>, a line each: "push DOMAIN NAME", "pop DOMAIN".
   Calls outside any domain are written too, with the domain "-". nvtx3 loads it from $NVTX_INJECTION64_PATH. */
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct nvtxDomainRegistration_st {
  char name[64];
};

static FILE *file;
static __thread int depth;

static void record(const char *what, nvtxDomainHandle_t domain, const char *name) {
  fprintf(file, "%s %s %s\n", what, domain ? domain->name : "-", name);
  fflush(file);
}

static const char *text(const nvtxEventAttributes_t *event) {
  return event->messageType == NVTX_MESSAGE_TYPE_ASCII ? event->message.ascii : "?";
}

static nvtxDomainHandle_t NVTX_API create(const char *name) {
  struct nvtxDomainRegistration_st *domain = calloc(1, sizeof *domain);
  strncpy(domain->name, name, sizeof domain->name - 1);
  return domain;
}

static int NVTX_API domain_push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t *event) {
  record("push", domain, text(event));
  return depth++;
}

static int NVTX_API domain_pop(nvtxDomainHandle_t domain) {
  record("pop", domain, "");
  return --depth;
}

static int NVTX_API push(const char *name) {
  record("push", NULL, name);
  return depth++;
}

static int NVTX_API push_event(const nvtxEventAttributes_t *event) { return push(text(event)); }

static int NVTX_API pop(void) { return domain_pop(NULL); }

int NVTX_API InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
  const NvtxExportTableCallbacks *callbacks = get_table(NVTX_ETID_CALLBACKS);
  NvtxFunctionTable core, domains;
  unsigned size;
  char path[4096];
  if (!callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &core, &size) ||
      !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &domains, &size))
    return 0;
  if (!file) { /* each library that carries nvtx3 initialises on its own */
    snprintf(path, sizeof path, "%s.%d", getenv("NVTX_RECORD"), (int)getpid());
    if (!(file = fopen(path, "a"))) return 0;
  }
  *core[NVTX_CBID_CORE_RangePushA] = (NvtxFunctionPointer)push;
  *core[NVTX_CBID_CORE_RangePushEx] = (NvtxFunctionPointer)push_event;
  *core[NVTX_CBID_CORE_RangePop] = (NvtxFunctionPointer)pop;
  *domains[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)create;
  *domains[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)domain_push;
  *domains[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)domain_pop;
  return 1;
}
