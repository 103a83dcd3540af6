#include "devices.h"

/* ---- PCI ---------------------------------------------------------------------------------------------------- */

#define PCI_ADDRESS 0xcf8
#define PCI_DATA 0xcfc

/* `device` is the number as the address register wants it: device << 11 | function << 8. */
u32 pci_read(u32 device, u32 reg)
{
    outl(PCI_ADDRESS, 0x80000000u | device | reg);
    return inl(PCI_DATA);
}

int pci_find(u32 id, u32 *device)
{
    for (u32 number = 0; number < 256; number++) {
        if (pci_read(number << 8, 0) == id) {
            *device = number << 8;
            return 1;
        }
    }
    return 0;
}

/* ---- PS/2 controller (8042) --------------------------------------------------------------------------------- */

#define PS2_DATA 0x60
#define PS2_COMMAND 0x64
#define PS2_STATUS_OUTPUT 0x01      /* a byte waits for us */
#define PS2_STATUS_INPUT 0x02       /* the controller still works on our last byte */
#define PS2_STATUS_MOUSE 0x20       /* the waiting byte comes from the mouse */

static void ps2_send(u16 port, u8 value)
{
    while (inb(PS2_COMMAND) & PS2_STATUS_INPUT)
        ;
    outb(port, value);
}

void ps2_start(void)
{
    while (inb(PS2_COMMAND) & PS2_STATUS_OUTPUT)
        inb(PS2_DATA);
    ps2_send(PS2_COMMAND, 0x60);    /* write the configuration byte: */
    ps2_send(PS2_DATA, 0x47);       /* both interrupts, both ports on, translate to scan code set 1 */
    ps2_send(PS2_COMMAND, 0xd4);    /* to the mouse: */
    ps2_send(PS2_DATA, 0xf4);       /* report. Without it qemu raises no IRQ 12 for the vmmouse port either. */
}

int keyboard_read(void)
{
    for (;;) {
        u8 status = inb(PS2_COMMAND);
        if (!(status & PS2_STATUS_OUTPUT))
            return -1;
        u8 value = inb(PS2_DATA);
        if (!(status & PS2_STATUS_MOUSE))
            return value;
    }
}

/* ---- vmmouse: VMware's backdoor port, which qemu has on pc and q35 (vmport=auto) ------------------------------ */

#define VMPORT_MAGIC 0x564d5868
#define VMPORT_PORT 0x5658
#define VMMOUSE_DATA 39
#define VMMOUSE_STATUS 40
#define VMMOUSE_COMMAND 41
#define VMMOUSE_ENABLE 0x45414552
#define VMMOUSE_ABSOLUTE 0x53424152

struct vmport_answer {
    u32 eax, ebx, ecx, edx;
};

static struct vmport_answer vmport(u32 command, u32 argument)
{
    struct vmport_answer r = { VMPORT_MAGIC, argument, command, VMPORT_PORT };
    __asm__ volatile("inl %%dx, %%eax"
                     : "+a"(r.eax), "+b"(r.ebx), "+c"(r.ecx), "+d"(r.edx) : : "memory", "esi", "edi");
    return r;
}

void vmmouse_start(void)
{
    vmport(VMMOUSE_COMMAND, VMMOUSE_ENABLE);
    vmport(VMMOUSE_STATUS, 0);
    vmport(VMMOUSE_DATA, 1);        /* the first word after enabling is the protocol's version */
    vmport(VMMOUSE_COMMAND, VMMOUSE_ABSOLUTE);
}

int vmmouse_read(struct pointer *pointer)
{
    u32 status = vmport(VMMOUSE_STATUS, 0).eax;
    if ((status & 0xffff0000) == 0xffff0000) {      /* queue overrun: qemu switched the device off */
        vmmouse_start();
        return 0;
    }
    if ((status & 0xffff) < 4)
        return 0;
    struct vmport_answer packet = vmport(VMMOUSE_DATA, 4);
    pointer->buttons = packet.eax & 0x38;
    pointer->x = packet.ebx & 0xffff;
    pointer->y = packet.ecx & 0xffff;
    return 1;
}

/* ---- fw_cfg: strings that the host hands to the guest (qemu docs/specs/fw_cfg) -------------------------------- */

#define FW_CFG_SELECT 0x510
#define FW_CFG_DATA 0x511
#define FW_CFG_SIGNATURE 0x00
#define FW_CFG_DIRECTORY 0x19

struct fw_cfg_file {
    u8 size[4], key[2], reserved[2];    /* big-endian */
    char name[56];
};

static u32 big_endian(const u8 *bytes, u32 count)
{
    u32 value = 0;
    while (count--)
        value = value << 8 | *bytes++;
    return value;
}

static int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

u32 fw_cfg_read(const char *name, char *to, u32 size)
{
    u8 word[4];
    for (u32 i = 0; i < size; i++)
        to[i] = 0;
    outw(FW_CFG_SELECT, FW_CFG_SIGNATURE);
    inb_block(FW_CFG_DATA, word, 4);
    if (big_endian(word, 4) != 0x51454d55)          /* "QEMU" */
        return 0;
    outw(FW_CFG_SELECT, FW_CFG_DIRECTORY);
    inb_block(FW_CFG_DATA, word, 4);
    for (u32 left = big_endian(word, 4); left; left--) {
        struct fw_cfg_file file;
        inb_block(FW_CFG_DATA, &file, sizeof file);
        file.name[sizeof file.name - 1] = 0;
        if (!same(file.name, name))
            continue;
        u32 length = big_endian(file.size, 4);
        if (length > size - 1)
            length = size - 1;
        outw(FW_CFG_SELECT, (u16)big_endian(file.key, 2));
        inb_block(FW_CFG_DATA, to, length);
        return length;
    }
    return 0;
}

/* ---- Power: the ACPI PM1 registers, where the BIOS has put them ----------------------------------------------- */

#define PIIX4_PM 0x71138086u        /* machine type pc */
#define ICH9_LPC 0x29188086u        /* machine type q35 */
#define PM_BASE 0x40                /* in both chips */
#define PM1_STATUS 0
#define PM1_ENABLE 2
#define PM1_CONTROL 4
#define PM1_POWER_BUTTON 0x0100
#define PM1_SLEEP 0x2000            /* SLP_EN with SLP_TYP 0, which is S5 on both */

static u16 pm_base;

void power_start(void)
{
    u32 device;
    if (!pci_find(PIIX4_PM, &device) && !pci_find(ICH9_LPC, &device))
        return;
    pm_base = pci_read(device, PM_BASE) & 0xff80;
    /* qemu sets the status bit only when the event is enabled. The interrupt (IRQ 9) stays masked: we poll. */
    outw(pm_base + PM1_STATUS, PM1_POWER_BUTTON);
    outw(pm_base + PM1_ENABLE, PM1_POWER_BUTTON);
}

int power_button_pressed(void)
{
    if (!pm_base || !(inw(pm_base + PM1_STATUS) & PM1_POWER_BUTTON))
        return 0;
    outw(pm_base + PM1_STATUS, PM1_POWER_BUTTON);   /* writing the bit clears it */
    return 1;
}

void power_off(void)
{
    if (pm_base)
        outw(pm_base + PM1_CONTROL, PM1_SLEEP);
}

void power_reset(void)
{
    ps2_send(PS2_COMMAND, 0xfe);
}
